"""The service: caches over Arrow Flight, for students that share no file system with them (docs/service.md).

`run_server` serves, `open_served` reads: what it returns is read like any other cache.
"""
