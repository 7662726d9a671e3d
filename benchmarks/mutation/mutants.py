"""Mutants of a source file: an operator or a comparison turned, a condition negated, a constant changed by one.

Cosmic Ray makes the changes. Left out are those that hardly a test could miss, such as `<<` for `+`, and those that no
number depends on: inside annotations, the markers of a signature, and what asserts something of the program itself
(`strict=` of zip, `frozen=` of a dataclass).
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

BINARY = "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Pow_Mul Mod_FloorDiv LShift_RShift BitAnd_BitOr BitOr_BitAnd"
COMPARISON = "Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is"
UNARY = "Delete_Not Delete_USub Delete_Invert"
OTHERS = """AddNot ReplaceAndWithOr ReplaceOrWithAnd ReplaceTrueWithFalse ReplaceFalseWithTrue NumberReplacer
    ZeroIterationForLoop ReplaceBreakWithContinue ReplaceContinueWithBreak ExceptionReplacer RemoveDecorator"""
OPERATORS = [
    *(f"core/ReplaceBinaryOperator_{turn}" for turn in BINARY.split()),
    *(f"core/ReplaceComparisonOperator_{turn}" for turn in COMPARISON.split()),
    *(f"core/ReplaceUnaryOperator_{turn}" for turn in UNARY.split()),
    *(f"core/{name}" for name in OTHERS.split()),
]


@dataclass(frozen=True)
class Mutant:
    """One change of one file: the text before and after, and where."""

    file: str
    line: int
    before: str
    after: str
    code: str

    @property
    def name(self) -> str:
        """What tells the mutant from others, of other versions of its file too."""
        return hashlib.sha256(f"{self.file} {self.code}".encode()).hexdigest()[:16]

    @property
    def change(self) -> tuple[str, str, str]:
        """What it changes, wherever the line moves to."""
        return self.file, self.before, self.after


def sites(source: str) -> list[tuple[str, int, int]]:
    """Every operator, occurrence and line at which a source text can be changed."""
    nodes, ignored = list(ast_nodes(get_ast(source))), list(_annotations(source))
    found = []
    for name in OPERATORS:
        operator, occurrence = get_operator(name)(), 0
        for node in nodes:
            for start, _ in operator.mutation_positions(node):
                if not _is_no_number(node) and not any(a <= start < b for a, b in ignored):
                    found.append((name, occurrence, start[0]))
                occurrence += 1
    return found


def _is_no_number(node: Any) -> bool:
    """Whether it is a marker in a signature, or the value of `strict=` or `frozen=`."""
    parent = node.parent
    if parent is not None and parent.type == "argument":
        return parent.children[0].get_code().strip() in ("strict", "frozen")
    return parent is not None and parent.type in ("parameters", "lambdef")


def _annotations(source: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Start and end of every annotation, as (line, column)."""
    for node in ast.walk(ast.parse(source)):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if part is not None:
                yield (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)


def made(root: Path, file: str, operator: str, occurrence: int, line: int) -> Mutant | None:
    """Make the mutant of a site; None where it is no Python or no change."""
    source = (root / file).read_text()
    code = mutate_code(source, get_operator(operator)(), occurrence)
    try:
        compile(code, file, "exec")
    except SyntaxError:
        return None
    lines = list(difflib.unified_diff(source.splitlines(), code.splitlines(), lineterm="", n=0))[3:]
    before, after = (" ".join(text[1:].strip() for text in lines if text[0] == sign) for sign in "-+")
    return Mutant(file, line, before, after, code) if before != after else None


def sample(root: Path, files: list[str], size: int, seed: int) -> list[Mutant]:
    """Draw mutants, from each file in proportion to its sites; all of them for size 0."""
    random_numbers = random.Random(seed)
    everything = []
    for file in files:
        of_file = [(file, *site) for site in sites((root / file).read_text())]
        random_numbers.shuffle(of_file)
        everything += of_file
    size = min(size, len(everything)) or len(everything)
    step = len(everything) / size
    chosen = [everything[int(step * (index + random_numbers.random()))] for index in range(size)]
    return [mutant for site in chosen if (mutant := made(root, *site))]
