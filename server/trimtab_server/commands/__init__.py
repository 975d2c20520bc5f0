"""The sub-commands of `trimtab` that talk to the admin API, and `serve`."""
