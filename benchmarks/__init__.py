"""Benchmarks of jaxflow against its rivals; README.md says how to run and read them."""
