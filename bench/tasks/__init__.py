"""The five tasks of IPA on real data: data, rewards, judges, systems and figures; `run.py` does one from end to end."""
