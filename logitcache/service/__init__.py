"""The service: caches and teachers over Arrow Flight, for students that share no machine with them (docs/service.md).

`run_server` serves; `open_served` reads a cache, which is then like any other; `open_scorer` has a teacher score.
"""
