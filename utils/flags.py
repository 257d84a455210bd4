"""Writes docs/flags.md, all flags of both training scripts with their defaults, as `--help` tells them.

    make flags

tests/test_project.py checks that the page is that of the scripts.
"""

import argparse
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_dopsd_full as full  # noqa: E402
import train_dopsd_lora as lora  # noqa: E402


def rows_of(parser, known=()):
    """Markdown of each group of flags, those in `known` left out."""
    for group in parser._action_groups:
        actions = [
            a
            for a in group._group_actions
            if a.option_strings and a.help != argparse.SUPPRESS and a.dest not in {"help", *known}
        ]
        if not actions:
            continue
        yield f"\n### {group.title[0].upper() + group.title[1:]}\n\n| flag | default | |\n|---|---|---|"
        for action in actions:
            default = "" if action.default is None or action.default is False else f"`{action.default}`"
            choices = f" One of {', '.join(f'`{choice}`' for choice in action.choices)}." if action.choices else ""
            text = f"{'Required. ' if action.required else ''}{action.help}{choices}".replace("|", "\\|")
            yield f"| {', '.join(f'`{name}`' for name in action.option_strings)} | {default} | {text} |"


def page():
    """Text of docs/flags.md."""
    parsers = {}
    for module in (lora, full):
        parsers[module] = lora.ArgumentParser(add_help=False)
        module.add_shared_arguments(parsers[module])
    shared = {action.dest for action in parsers[lora]._actions}
    lora.add_lora_arguments(parsers[lora])
    full.add_full_arguments(parsers[full])
    lines = ["# All flags\n\nWritten by `make flags` from the scripts themselves.\n\n## Of both scripts"]
    own = {module: {a.dest for a in parser._actions} - shared for module, parser in parsers.items()}
    lines += rows_of(parsers[lora], own[lora])
    lines += ["\n## Of train_dopsd_lora.py alone", *rows_of(parsers[lora], shared)]
    lines += ["\n## Of train_dopsd_full.py alone", *rows_of(parsers[full], shared)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "flags.md").write_text(page(), "utf-8")
