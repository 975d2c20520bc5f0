"""Routes under /admin, guarded by their own key."""
