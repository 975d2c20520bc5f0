"""What the bench scripts share: random models, systems in processes of their own, statistics."""
