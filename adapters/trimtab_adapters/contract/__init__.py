"""Types shared by gateway, engine and trainer. Light: pydantic and numpy only, never torch."""
