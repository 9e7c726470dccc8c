"""Result rows: their schema, and the folder they are written to, read from and merged in."""

from saebench.results.folder import ResultsFolder
from saebench.results.schema import COLUMNS, KEY, SCHEMA_VERSION, arrow_schema, columns_table
from saebench.results.seal import DamagedFile

__all__ = [
    "COLUMNS",
    "KEY",
    "SCHEMA_VERSION",
    "DamagedFile",
    "ResultsFolder",
    "arrow_schema",
    "columns_table",
]
