"""The columns of a result row: one table that the writer, the reader and docs/results.md share.

A row is one measured number in long format. Its key is `unit_id, split, group, metric, variant`.

The schema's version changes when a column is removed, renamed, or changes its type or meaning, and
then `MIGRATIONS` says how an older table becomes a newer one. Adding a column that may be empty
changes nothing: older rows read as empty there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 1

MIGRATIONS: dict[int, Callable[[pa.Table], pa.Table]] = {}
"""Version v -> what turns a table of version v into one of version v + 1."""

KEY = ("unit_id", "split", "group", "metric", "variant")

Type = Literal["string", "int64", "float64", "bool", "timestamp"]


@dataclass(frozen=True)
class Column:
    """One column. `nullable`: a row may leave it empty. `variant`: it may stand in `variant`."""

    name: str
    type: Type
    doc: str
    nullable: bool = False
    variant: bool = False


def _variant(name: str, type: Type, doc: str) -> Column:
    return Column(name, type, doc, nullable=True, variant=True)


COLUMNS: tuple[Column, ...] = (
    # the key, and the number
    Column("unit_id", "string", "what was measured on what: hash of everything that can change it"),
    Column("split", "string", "split of the dataset that was measured"),
    Column(
        "group", "string", "`all` or a token kind, and with `/<level>=<value>` one label's images"
    ),
    Column("metric", "string", "what was measured: one name, one formula (docs/metrics.md)"),
    Column("variant", "string", "empty for the default, else sorted `key=value`, joined by `;`"),
    Column("value", "float64", "the number; empty: undefined, and `note` says why", nullable=True),
    Column("ci_low", "float64", "lower end of the 95 % interval", nullable=True),
    Column("ci_high", "float64", "upper end of the 95 % interval", nullable=True),
    Column("unit", "string", "unit of value and interval; `1` for a plain ratio"),
    Column("better", "string", "`lower`, `higher`, `one` (1 is best) or `none`"),
    Column("n", "int64", "what the value is a mean over: mostly rows, a row being one token"),
    Column("n_images", "int64", "images that were seen"),
    Column("note", "string", "why a value is undefined, or what to know when reading it"),
    # on what
    Column("backbone", "string", "registry name of the backbone"),
    Column("backbone_family", "string", "clip, dinov2, vit, resnet, …"),
    Column("backbone_architecture", "string", "architecture of the backbone"),
    Column("pretraining", "string", "how the backbone was trained"),
    Column("corpus", "string", "what the backbone was trained on"),
    Column("backbone_hash", "string", "hash of the backbone, its weights, its pixels and the site"),
    Column("backbone_revision", "string", "commit of its weights' repository", nullable=True),
    Column("backbone_sha256", "string", "hash of its weights file", nullable=True),
    Column(
        "sae",
        "string",
        "registry name of the SAE, or name of the control; of a set, joined by ` + `",
    ),
    Column(
        "sae_architecture",
        "string",
        "relu, topk, jumprelu, …; a control's kind; of a set, those in it",
    ),
    Column("sae_recipe", "string", "how the SAE was trained; `control` for a control"),
    Column("sae_seed", "int64", "seed that the SAE was trained with", nullable=True),
    Column("sae_hash", "string", "hash of the SAE, its weights and how it is read"),
    Column("sae_revision", "string", "commit of its weights' repository", nullable=True),
    Column("sae_sha256", "string", "hash of its weights file", nullable=True),
    Column("sae_format", "string", "checkpoint format that its file has", nullable=True),
    Column(
        "sae_estimated",
        "string",
        "facts that nobody states: estimated from train activations, joined by `,`; empty: none",
        nullable=True,
    ),
    Column("origin", "string", "where the entry was found: built in, a folder, a package"),
    Column("site", "string", "place in the backbone, as the registry names it; of a set, joined"),
    Column("tokens", "string", "token kinds that the SAE covers; of a set, joined"),
    Column("d_model", "int64", "width of the activations; of a set, of the first"),
    Column("d_sae", "int64", "number of latents; of a set, of all in it"),
    Column(
        "depth",
        "int64",
        "1 for an SAE on a backbone, 2 for an SAE on an SAE, …; of a set, the most",
    ),
    Column("task", "string", "name of the task"),
    Column("task_version", "int64", "rises when a number of the task could change"),
    Column("task_sha256", "string", "hash of the task's file", nullable=True),
    Column("dataset", "string", "registry name of the dataset"),
    Column("dataset_revision", "string", "its entry's revision, or the commit of its repository"),
    Column("dataset_sha256", "string", "hash of the split's ids and labels", nullable=True),
    Column("stratified", "bool", "whether a limit keeps the proportions of classes", nullable=True),
    Column("n_skipped", "int64", "images that did not decode and were left out", nullable=True),
    # how
    Column("seed", "int64", "seed of the run (random controls, probes; never the bootstrap)"),
    Column("limit", "int64", "`--limit`: first images of the split; empty: all", nullable=True),
    Column("device", "string", "what computed it"),
    Column("dtype", "string", "dtype of the backbone's forward pass"),
    Column("batch", "int64", "images in a batch"),
    Column("deterministic", "bool", "whether the same machine gives the same bits again"),
    Column("seconds", "float64", "time of the pass that measured it, shared with its whole wave"),
    Column("peak_mem_bytes", "int64", "peak memory so far, of the GPU or of the process"),
    Column("run_id", "string", "the run that measured it"),
    Column("created_utc", "timestamp", "when it was measured"),
    Column("schema_version", "int64", "version of this table"),
    Column("saebench_version", "string", "version of saebench"),
    Column("git_sha", "string", "commit of the checkout; empty when installed"),
    Column("git_dirty", "bool", "whether that checkout was changed", nullable=True),
    Column("torch_version", "string", "version of torch"),
    Column("env", "string", "JSON: versions of everything else that computes"),
    Column("n_train", "int64", "train images that a probe was fitted on", nullable=True),
    Column("penalty", "float64", "λ of a probe: λ/2 ‖W‖² beside the mean loss", nullable=True),
    Column(
        "converged", "bool", "whether a probe's loss is within 1e-4 of the least", nullable=True
    ),
    Column(
        "baseline",
        "float64",
        "what a difference is measured from: the same measure on the untouched activations",
        nullable=True,
    ),
    # what distinguishes a row from its metric's default
    _variant("loss", "string", "head_ce, zero_shot_ce, linear_head_ce, retrieval_ce"),
    _variant(
        "head",
        "string",
        "what reads the embedding: classifier, zero_shot, published, probe",
    ),
    _variant("texts", "string", "of a zero-shot head: templates (all of them) or names (bare)"),
    _variant("names", "string", "which names of the classes a zero-shot head reads"),
    _variant("temperature", "string", "of the logits: `model` (its own scale) or a number"),
    _variant("replaced", "string", "tokens that the reconstruction takes the place of"),
    _variant("ablated", "string", "tokens that were ablated for comparison"),
    _variant("last_block", "string", "full, or cls: only what the head reads was computed"),
    _variant(
        "pooling",
        "string",
        "how codes of several tokens become one vector: max, mean; none: of one token",
    ),
    _variant(
        "feature",
        "string",
        "what a linear head or a probe reads of an image: cls, mean, embedding, …",
    ),
    _variant("solver", "string", "how a probe was fitted: logistic, ridge"),
    _variant("label", "string", "label level that a probe was fitted to; empty: the main label"),
    _variant("level", "string", "higher label level that a probe's probabilities were added up to"),
    _variant("latents", "int64", "best-ranked latents that a probe of codes was limited to"),
    _variant("shots", "int64", "train images of each class that a probe was fitted on; empty: all"),
    _variant("condition", "string", "of a transfer: `base->ft`, …"),
    _variant("filtered", "string", "rows left out as outliers"),
    _variant("reference", "string", "what a gap is measured against"),
    _variant("convention", "string", "whose formula, where it is not ours (docs/metrics.md)"),
    _variant("tau", "float64", "threshold on a firing density"),
    _variant("quantile", "float64", "quantile over latents, 0 to 1"),
    _variant("budget", "int64", "tokens or images seen before something is counted"),
    _variant("basis", "string", "what is taken as independent: rows or images"),
    _variant("k", "int64", "number of latents used"),
)

BY_NAME: dict[str, Column] = {column.name: column for column in COLUMNS}
VARIANT_COLUMNS: tuple[str, ...] = tuple(c.name for c in COLUMNS if c.variant)


@cache
def arrow_schema() -> pa.Schema:
    """The columns as a pyarrow schema, with what makes every pandas read the same dtypes.

    Plain pandas would read a column of integers as floats as soon as one of them is empty, so that
    a dtype depended on the data: those columns are marked as pandas' `Int64` and `boolean`.
    """
    import json

    import pyarrow as pa

    types = {
        "string": pa.string(),
        "int64": pa.int64(),
        "float64": pa.float64(),
        "bool": pa.bool_(),
        "timestamp": pa.timestamp("us", tz="UTC"),
    }
    extension = {"int64": "Int64", "bool": "boolean"}
    marked = [
        {
            "name": column.name,
            "field_name": column.name,
            "pandas_type": column.type,
            "numpy_type": extension[column.type],
            "metadata": None,
        }
        for column in COLUMNS
        if column.nullable and column.type in extension
    ]
    pandas = {"index_columns": [], "column_indexes": [], "columns": marked, "pandas_version": "2.2"}
    return pa.schema(
        [pa.field(column.name, types[column.type]) for column in COLUMNS],
        metadata={"pandas": json.dumps(pandas), "saebench_schema": str(SCHEMA_VERSION)},
    )


def columns_table() -> str:
    """The table of columns in docs/results.md (Markdown); a test holds the page to it."""
    lines = ["| column | type | what it says |", "|---|---|---|"]
    for column in COLUMNS:
        doc = column.doc.replace("|", "\\|")
        kind = column.type + (", may be empty" if column.nullable else "")
        lines.append(f"| `{column.name}` | {kind} | {doc} |")
    return "\n".join(lines)
