"""Write docs/architectures.md: what `pagating.patch` does to every model type of transformers.

    python docs/make_architectures.py [TYPE ...]

Each type is built on the `meta` device with its default sizes and at most four layers, patched, and run if its input is
known. Names of types print their rows instead. It takes two minutes.
"""

import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import pagating
from pagating.gating.alpha import AlphaModule

PAGE = Path(__file__).with_name("architectures.md")
LAYERS = re.compile(r"(num_)?(hidden_|encoder_|decoder_)?(n_)?layers?|[ed]_layers|(encoder|decoder)_layers")
A_FILE = re.compile(r" from '[^']*'")  # where this machine keeps a module
MOST = 4
INTRO = """# What `pagating.patch` finds in each model of transformers

`python docs/make_architectures.py` writes this page, with transformers {version}. It builds every model type on the
`meta` device, patches it with an alpha per channel and runs it. `patched` is the number of activations in a model of at
most {most} layers. `run` says whether a forward pass called every unit: `yes`, or how many it called. Models of several
inputs are run with text alone, so that their encoders of images and sound are not called. It is empty if the model was
not run. `left` names what was not replaced, and why; numbers in names are 0.

{summary}

| type | class | patched | run | replaced | left, or why it is refused |
| --- | --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True)
class Row:
    """The result for one model type. `outcome` is patched, refused or not built."""

    name: str
    outcome: str
    model: str = ""
    count: int = 0
    ran: str = ""
    replaced: str = ""
    left: str = ""

    def __str__(self) -> str:
        cells = (f"`{self.name}`", self.model, str(self.count or ""), self.ran, self.replaced, self.left)
        return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def shrink(config: Any) -> None:
    """Limit the number of layers of a configuration, and of those inside it, as far as the class accepts it."""
    for key, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            shrink(value)
        elif isinstance(value, int) and LAYERS.fullmatch(key) and value > MOST:
            setattr(config, key, MOST)
        elif isinstance(value, list) and key.endswith("layer_types") and len(value) > MOST:
            kinds = list(dict.fromkeys(value))[:MOST]
            setattr(config, key, (kinds + value)[:MOST])


def classes(config: Any) -> Iterator[Any]:
    """Yield the model classes of a configuration, the bare model first."""
    tables = [getattr(modeling_auto, name) for name in dir(modeling_auto) if re.fullmatch("MODEL_.*MAPPING", name)]
    for table in sorted(tables, key=lambda table: table is not modeling_auto.MODEL_MAPPING):
        found = table.get(type(config), None) if type(config) in table else None
        yield from found if isinstance(found, tuple | list) else [found] if found else []


def build(name: str) -> tuple[nn.Module | None, str]:
    """Return a model of a type on the meta device, or None and the reason."""
    reason = "it has no model class of its own"
    for small in (True, False):
        try:
            config = CONFIG_MAPPING[name]()
            if small:
                shrink(config)
            for cls in dict.fromkeys(classes(config)):
                with torch.device("meta"):
                    return cls._from_config(config).eval(), ""
        except Exception as error:  # noqa: BLE001 (thousands of lines of others' code, and defaults that do not fit)
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return None, A_FILE.sub("", reason)[:120]


def inputs(model: Any) -> dict[str, torch.Tensor] | None:
    """Return a small input of a model, or None if it is not one of token ids or of pixels."""
    config, name = model.config, model.main_input_name
    if name == "input_ids":
        ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
        return {name: ids, "decoder_input_ids": ids} if config.is_encoder_decoder else {name: ids}
    size = getattr(config, "image_size", None)
    if name == "pixel_values" and size:
        height, width = size if isinstance(size, tuple | list) else (size, size)
        return {name: torch.zeros(1, getattr(config, "num_channels", 3), height, width, device="meta")}
    return None


def ran(model: Any) -> str:
    """Run a patched model. Return `yes` if each unit was called, else how many, or nothing if it does not run."""
    units = [module for module in model.modules() if isinstance(module, AlphaModule)]
    called: set[int] = set()
    for unit in units:
        unit.register_forward_hook(lambda module, *_: called.add(id(module)))
    batch = inputs(model)
    if batch is None:
        return ""
    try:
        with torch.no_grad():
            if hasattr(model, "set_experts_implementation"):
                model.set_experts_implementation("batched_mm")  # the loop over experts depends on values
            model(**batch)
    except Exception:  # noqa: BLE001 (many models need other inputs)
        return ""
    return "yes" if len(called) == len(units) else f"{len(called)} units"


def row(name: str) -> Row:
    """Build, patch and run one model type."""
    model, reason = build(name)
    if model is None:
        return Row(name, "not built", left=f"not built: {reason}")
    try:
        report = pagating.patch(model, alpha={"learnable": {"per": "channel"}})
    except ValueError as error:
        seen = str(error).partition("; seen: ")[2] or str(error)
        return Row(name, "refused", type(model).__name__, left=f"refused: {seen}")
    names = dict.fromkeys(f"`{re.sub('[0-9]+', '0', each)}`" for each in report.names)
    left = dict.fromkeys(f"`{re.sub('[0-9]+', '0', each)}`: {why}" for each, why in report.why.items())
    return Row(name, "patched", type(model).__name__, report.count, ran(model), few(names, ", "), few(left, "; "))


def few(texts: Iterable[str], separator: str, most: int = 4) -> str:
    """Join texts, at most `most` of them."""
    each = list(texts)
    return separator.join(each[:most]) + (f" and {len(each) - most} more" if len(each) > most else "")


def main(names: list[str]) -> None:
    """Print the rows of some types, or write the page of all."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = [row(name) for name in names or sorted(CONFIG_MAPPING)]
    if names:
        print("\n".join(map(str, rows)))
        return
    outcomes = {kind: sum(each.outcome == kind for each in rows) for kind in ("patched", "refused", "not built")}
    run = sum(each.ran == "yes" for each in rows)
    summary = (
        f"Of {len(rows)} types, {outcomes['patched']} are patched, {outcomes['refused']} refused and\n"
        f"{outcomes['not built']} not built: they are parts of other types, need another package, or have defaults\n"
        f"that do not fit together. A forward pass called every unit of {run} types."
    )
    intro = INTRO.format(version=transformers.__version__, most=MOST, summary=summary)
    PAGE.write_text(intro + "\n".join(map(str, rows)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
