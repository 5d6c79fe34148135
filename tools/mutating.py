"""Makes mutants with cosmic-ray, picks some by seed, and prints them as JSON. Its own environment runs this, not ours.

PYTHON-WITH-COSMIC-RAY tools/mutating.py COUNT SEED FILE ...
"""

from __future__ import annotations

import difflib
import importlib
import itertools
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str]) -> None:
    count, seed, *files = arguments
    plugins = importlib.import_module("cosmic_ray.plugins")
    made = [mutant for file in files for mutant in mutants(Path(file), plugins)]
    # In an order of chance, so that a part of a run is a fair sample, too.
    random.Random(int(seed)).shuffle(made)
    picked = list(
        itertools.islice(filter(compiles, (with_source(each, plugins) for each in made)), int(count))
    )
    print(json.dumps({"of": len(made), "mutants": picked}))


def compiles(mutant: dict[str, Any]) -> bool:
    """Some have no syntax, such as one with another operator in place of the `*` in a list of parameters."""
    try:
        compile(mutant["source"], mutant["file"], "exec")
    except SyntaxError:
        return False
    return True


def mutants(path: Path, plugins: Any) -> Iterator[dict[str, Any]]:
    """All of a file, without their sources: operator by operator, from top to bottom."""
    ast = importlib.import_module("cosmic_ray.ast")
    name_of = importlib.import_module("cosmic_ray.ast.ast_query").ASTQuery
    tree = ast.get_ast_from_path(path)
    for operator in sorted(plugins.operator_names()):
        kind = plugins.get_operator(operator)
        if kind.arguments():
            continue  # one that does nothing until it is told what to replace
        places = ((node, place) for node in ast.ast_nodes(tree) for place in kind().mutation_positions(node))
        for occurrence, (node, (start, _)) in enumerate(places):
            yield {
                "file": str(path),
                "operator": operator.removeprefix("core/"),
                "occurrence": occurrence,
                "line": start[0],
                "column": start[1],
                "in": name_of(node).get_definition_name(),
            }


def with_source(mutant: dict[str, Any], plugins: Any) -> dict[str, Any]:
    """And the file's text with the change, and the lines that differ."""
    mutating = importlib.import_module("cosmic_ray.mutating")
    before = Path(mutant["file"]).read_text()
    operator = plugins.get_operator(f"core/{mutant['operator']}")()
    after = mutating.mutate_code(before, operator, mutant["occurrence"])
    diff = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    return {**mutant, "source": after, "diff": [part for part in list(diff)[2:] if not part.startswith("@@")]}


if __name__ == "__main__":
    main(sys.argv[1:])
