"""The report of a training run: `report.html`, one file that opens without a network, and `report.json`."""
