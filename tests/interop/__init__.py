"""Files that other projects' own code writes, read here and held to their own forward pass.

`pytest -m interop`, where their packages are installed (the extra `interop`): in an environment of
their own where their pins clash with others'.
"""
