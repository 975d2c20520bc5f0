"""What a training run's report shows."""

from pydantic import Field

from trimtab_training.config_section import ConfigSection


class ReportConfig(ConfigSection):
    """The report that every run leaves in `output_dir/report`."""

    plots: bool = True
    """Whether plots are drawn, which takes some seconds."""
    show_samples: bool = False
    """Whether `report.html` shows outputs of base and steered policy side by side. They come from held-out prompts,
    which may be users' own words, and may be toxic."""
    samples_in_json: bool = False
    """Whether `report.json` holds the same samples."""
    num_samples: int = Field(default=8, ge=1, le=200)
    """Held-out prompts of which samples are shown; the run's seed chooses them."""
