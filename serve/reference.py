"""python -m serve.reference > docs/reference/options.md: the page of all options, from the classes that have them."""

import html
import sys

from emoe_jax.option_fields import Option, Options, options_of
from serve.options import TITLES, ServerOptions

COMMAND = "python -m serve.reference > docs/reference/options.md"

INTRODUCTION = f"""\
<!-- Made by `{COMMAND}`; do not edit. -->

# Options

Each option is a flag of `python -m serve.main`, and a key of the YAML file that `--config FILE` names. A flag wins over
the file. The options of the engine are also the fields of `EngineConfig` and the keywords of `Engine.load`. Their names
there have `_` in place of `-`:

```bash
python -m serve.main --max-num-seqs 8 --no-prefix-caching
```

```yaml
max-num-seqs: 8
prefix-caching: false
```

```python
Engine.load("checkpoints/demo", max_num_seqs=8, prefix_caching=False)
```

A yes-or-no option has two flags: `--memory-trade` and `--no-memory-trade`. A flag of several values takes them in one
place, or is repeated: `--api-key a b`, or `--api-key a --api-key b`.
"""


def page(kind: type[Options], titles: dict[type, str]) -> str:
    """The options as Markdown, a table for each class that has fields."""
    parts = [INTRODUCTION]
    for owner, title in titles.items():
        rows = [row(option) for option in options_of(kind) if option.owner is owner]
        head = ["| Flag | Values | Default | Meaning |", "| --- | --- | --- | --- |"]
        parts.append("\n".join([f"## Options of the {title}", "", *head, *rows, ""]))
    return "\n".join(parts)


def row(option: Option) -> str:
    """A line of a table: flag, values, default and meaning."""
    default = option.default_shown
    if default is not None and option.traits.default_text is None:
        default = f"`{default}`"
    cells = (f"`{option.flag}`", option.values, default or "", option.traits.help)
    return "| " + " | ".join(map(escaped, cells)) + " |"


def escaped(text: str) -> str:
    """The text in a cell of a table of Markdown."""
    return html.escape(text, quote=False).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(page(ServerOptions, TITLES))
