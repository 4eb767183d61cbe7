from tiny import one_thread  # noqa: F401
