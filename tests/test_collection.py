"""Workers of one test run must collect one list: nothing may take its order from the hash seed."""

import ast
import inspect
from pathlib import Path

import pytest


def at_import(node):
    """The expressions that run when a module is imported: decorators too, function bodies not."""
    inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    if not inside:
        yield node
    children = getattr(node, "decorator_list", []) if inside else ast.iter_child_nodes(node)
    for child in children:
        yield from at_import(child)


def is_set(node, names):
    if isinstance(node, ast.BinOp):
        return is_set(node.left, names) or is_set(node.right, names)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id in ("set", "frozenset")
    if isinstance(node, ast.Name):
        return isinstance(names.get(node.id), (set, frozenset))
    return isinstance(node, (ast.Set, ast.SetComp))


def orders_by_hash(source, names):
    """Lines whose lists, loops or test cases take the order of a set."""
    lines = []
    for node in at_import(ast.parse(source)):
        iterated = []
        if isinstance(node, (ast.ListComp, ast.DictComp, ast.GeneratorExp)):
            iterated = [part.iter for part in node.generators]
        elif isinstance(node, ast.For):
            iterated = [node.iter]
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("list", "tuple", "enumerate", "zip", "chain", "product"):
                iterated = node.args
            elif name == "parametrize":
                iterated = [*node.args[1:], *(k.value for k in node.keywords)]
        lines += [node.lineno for one in iterated if is_set(one, names)]
    return lines


def test_no_case_takes_its_order_from_a_set(request):
    """Of the test files of this run, and of the helpers that they import."""
    here = str(Path(__file__).parent)
    modules = {item.module.__name__: item.module for item in request.session.items}
    for module in list(modules.values()):
        for value in vars(module).values():
            owner = inspect.getmodule(value)
            if owner and (getattr(owner, "__file__", None) or "").startswith(here):
                modules[owner.__name__] = owner
    for name, module in modules.items():
        found = orders_by_hash(inspect.getsource(module), vars(module))
        assert not found, f"{name}: lines {found} list a set in the order of its hashes: sort it"


NAMES = {"a", "b"}


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        (
            "@mark.parametrize('n', NAMES)\ndef f(n): ...",
            "@mark.parametrize('n', sorted(NAMES))\ndef f(n): ...",
        ),
        ("CASES = [n for n in NAMES]", "CASES = [n for n in sorted(NAMES)]"),
        ("CASES = list({'a', 'b'} | NAMES)", "CASES = list(['a', 'b'])"),
        ("for n in set('ab'):\n    f(n)", "def f():\n    for n in set('ab'):\n        f(n)"),
        ("class A:\n    x = tuple({n for n in 'ab'})", "class A:\n    x = {n for n in NAMES}"),
    ],
)
def test_the_check_sees_an_order_of_hashes(wrong, right):
    assert orders_by_hash(wrong, globals())
    assert not orders_by_hash(right, globals())
