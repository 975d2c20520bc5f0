"""Steering of a base that is behind somebody else's API: the half that needs torch, run in the gateway's process."""
