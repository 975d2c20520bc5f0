"""What every part of a configuration tree is."""

from pydantic import BaseModel, ConfigDict


class ConfigSection(BaseModel):
    """A part of a configuration tree: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
