"""``python -m slim_jax`` is the program ``slim-jax``."""

from importlib import import_module

if __name__ == "__main__":
    import_module(
        "convert.cli"
    ).main()  # imported by name: an import statement would point up, from the library to its front end
