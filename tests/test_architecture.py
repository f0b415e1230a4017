"""The plan of the house, checked: who imports whom, how long things are, what is said aloud.

Read from the source with `ast`, nothing is imported. Every failure names file and line.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PACKAGE = REPO / "qr_integrations"
FILES = sorted(str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py"))

GROUND = {"errors", "types", "files", "version", "bundled", "images"}
CELLAR = GROUND | {"backend"}
ROOMS = {"retrieval", "cropping", "decoding", "encoding", "pruning"}
BELOW_THE_ROOF = CELLAR | ROOMS
# The arrow: what a room (a folder or a module of the package) may import from the others. Never back, never sideways.
MAY_IMPORT = {
    "errors": set(),
    "highlighting": set(),
    "files": set(),
    "version": set(),
    "images": {"errors"},
    "types": {"errors", "highlighting"},
    "bundled": {"errors", "types"},
    "backend": GROUND,
    **{room: CELLAR for room in ROOMS},
    "testing": BELOW_THE_ROOF,
    "model_settings": BELOW_THE_ROOF,
    "reranking": BELOW_THE_ROOF | {"model_settings"},
    "indexing": BELOW_THE_ROOF | {"model_settings", "reranking"},
    "chat_steps": BELOW_THE_ROOF,
    "picture_settings": BELOW_THE_ROOF | {"model_settings"},
    "chatting": BELOW_THE_ROOF | {"model_settings", "picture_settings", "chat_steps"},
    "embedding": BELOW_THE_ROOF | {"model_settings", "picture_settings"},
    "langchain": BELOW_THE_ROOF | {"reranking", "indexing", "chatting", "embedding"},
    "llama_index": BELOW_THE_ROOF | {"reranking", "indexing", "chatting", "embedding"},
    "serving": BELOW_THE_ROOF | {"reranking", "chatting", "chat_steps", "model_settings", "evaluation"},
    "evaluation": BELOW_THE_ROOF,
    "cli": BELOW_THE_ROOF | {"__init__", "testing", "evaluation", "serving", "reranking", "model_settings"},
    "__init__": BELOW_THE_ROOF,
}
# Who may import a library of others; a library that is not listed is free.
ONLY_IN = {
    "transformers": {"backend", "bundled", "testing"},
    "tokenizers": {"backend", "bundled", "testing"},
    "torch": CELLAR - {"types", "errors", "images"} | ROOMS | {"testing", "evaluation"},
    "langchain_core": {"langchain"},
    "llama_index": {"llama_index"},
    "rich": {"cli"},
    "ray": {"serving"},
    "fastapi": {"serving"},
    "starlette": {"serving"},
    "uvicorn": {"serving"},
    "prometheus_client": {"serving"},
    "sentence_transformers": {"evaluation", "encoding"},
    "pickle": set(),
}
FAMILY = re.compile(
    r"(llama|mistral|mixtral|qwen|gemma|phi|olmo|smollm|granite|falcon|llava|internvl|idefics|gpt_?neox?|deepseek)"
    r"([-_]?v?\d[\w.-]*|[-_](vl|moe|next)\w*)?",
    re.IGNORECASE,
)
MAX_FILE, MAX_BODY, P90_BODY = 400, 60, 30


Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.ClassDef | Function

# ---- reading


@cache
def tree_of(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"), filename=file)


def room_of(file: str) -> str:
    parts = Path(file).parts
    return parts[0] if len(parts) > 1 else Path(file).stem


def module_of(file: str) -> str:
    parts = [PACKAGE.name, *Path(file).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def imports(file: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import, lazy ones and those for type checkers included."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folder = [PACKAGE.name, *Path(file).parent.parts]
            above = folder[: len(folder) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield node.lineno, whole if whole in MODULES else source


def functions(file: str) -> Iterator[tuple[Function, int]]:
    """Every function, nested ones too, with the lines of its body: from the first statement after the docstring."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, Function):
            body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
            yield node, (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def public(body: list[ast.stmt], owner: str = "") -> Iterator[tuple[Definition, str]]:
    """Public classes, their public methods, and public functions; not what lives inside a function."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node, owner + node.name
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{node.name}.")


def is_exempt(node: Definition) -> bool:
    """An overload and a property's setter share the docstring of the function they belong to."""
    marks = {ast.unparse(d).split(".")[-1] for d in node.decorator_list}
    return bool(marks & {"overload", "setter", "deleter"})


def questions(file: str) -> Iterator[ast.expr]:
    """Comparisons (`in`, `==`), and calls that ask how a word begins or ends."""
    for node in ast.walk(tree_of(file)):
        asks_a_word = isinstance(node, ast.Call) and dotted(node.func).endswith((".startswith", ".endswith"))
        if isinstance(node, ast.Compare) or (asks_a_word and isinstance(node, ast.expr)):
            yield node


def dotted(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def report(file: str, found: list[tuple[int, str]]) -> str:
    return "\n".join(f"qr_integrations/{file}:{line}: {what}" for line, what in found)


each_file = pytest.mark.parametrize("file", FILES)


# ---- who imports whom


@each_file
def test_the_arrow(file: str) -> None:
    room = room_of(file)
    assert room in MAY_IMPORT, f"qr_integrations/{file}:1: a new room; give {room!r} its place in MAY_IMPORT"
    bad = []
    for line, module in imports(file):
        if module.split(".")[0] != PACKAGE.name:
            continue
        target = (*module.split("."), "__init__")[1]
        if target != room and target not in MAY_IMPORT[room]:
            bad.append((line, f"{room} may not import {target} ({module})"))
    assert not bad, report(file, bad)


@each_file
def test_libraries_stay_in_their_rooms(file: str) -> None:
    room = room_of(file)
    bad = [
        (line, f"{module} may be imported in {sorted(ONLY_IN[top]) or 'no room'} only")
        for line, module in imports(file)
        if (top := module.split(".")[0]) in ONLY_IN and room not in ONLY_IN[top]
    ]
    assert not bad, report(file, bad)


def test_no_module_imports_itself_through_others() -> None:
    graph = {name: {m for _, m in imports(file) if m in MODULES and m != name} for name, file in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        # graphlib lists a module before the one that imports it.
        pytest.fail("import cycle: " + " -> ".join(reversed(error.args[1])))


# ---- how long things are


@each_file
def test_a_file_fits_in_the_head(file: str) -> None:
    lines = len((PACKAGE / file).read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE, f"qr_integrations/{file}:{lines}: {lines} lines, {MAX_FILE} are allowed"


@each_file
def test_no_body_is_too_long(file: str) -> None:
    bad = [(f.lineno, f"{f.name} has {n} lines, {MAX_BODY} are allowed") for f, n in functions(file) if n > MAX_BODY]
    assert not bad, report(file, bad)


def test_most_bodies_are_short() -> None:
    bodies = sorted((n, f"qr_integrations/{file}:{f.lineno}: {f.name}") for file in FILES for f, n in functions(file))
    p90 = bodies[int(0.9 * len(bodies))][0]
    longest = "\n".join(f"{where} has {n} lines" for n, where in reversed(bodies[-10:]))
    assert p90 <= P90_BODY, (
        f"nine of ten bodies have up to {p90} lines, {P90_BODY} are allowed; the longest:\n{longest}"
    )


# ---- what is said, and what is not


@each_file
def test_everything_public_is_explained(file: str) -> None:
    tree = tree_of(file)
    bad = [] if not tree.body or ast.get_docstring(tree) else [(1, "the module has no docstring")]
    for node, name in public(tree.body):
        if not ast.get_docstring(node) and not is_exempt(node):
            bad.append((node.lineno, f"{name} has no docstring"))
    assert not bad, report(file, bad)


@each_file
def test_names_say_what_a_thing_is(file: str) -> None:
    assert not re.fullmatch(r"(utils?|helpers?|common|misc)\.py", Path(file).name), f"qr_integrations/{file}:1: name it"
    bad = [
        (node.lineno, f"what does {node.name} do? Name that instead")
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.ClassDef) and re.search(r"(Manager|Helper|Utils?)$", node.name)
    ]
    assert not bad, report(file, bad)


@each_file
def test_model_families_are_told_apart_in_one_table(file: str) -> None:
    if file == "backend/families.py":
        return
    bad = []
    for question in questions(file):
        words = [node.value for node in ast.walk(question) if isinstance(node, ast.Constant)]
        families = [word for word in words if isinstance(word, str) and FAMILY.fullmatch(word)]
        bad += [(question.lineno, f"asks for {name!r}; that is a row of families.py") for name in families]
    assert not bad, report(file, bad)


@each_file
def test_nothing_is_printed_or_unpickled(file: str) -> None:
    calls = [n for n in ast.walk(tree_of(file)) if isinstance(n, ast.Call)]
    banned = {"torch.load", "eval", "exec"} | (set() if room_of(file) == "cli" else {"print"})
    bad = [(n.lineno, f"calls {dotted(n.func)}") for n in calls if dotted(n.func) in banned]
    assert not bad, report(file, bad)


# ---- the map


def paths_in_readme() -> list[str]:
    """Paths of the fenced block after `<!-- tree -->`: indented below their folder, several with two spaces between."""
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- tree -->\s*^```\w*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert block, "README.md has no fenced block after <!-- tree -->"
    paths, folders = [], [(-1, "")]
    for raw in block[1].splitlines():
        line = re.sub(r"[│├└─]", " ", raw)
        indent = len(line) - len(line.lstrip())
        names = columns(line)
        while names and folders[-1][0] >= indent:
            folders.pop()
        paths += [folders[-1][1] + name for name in names]
        if names and names[0].endswith("/"):
            folders.append((indent, paths[-len(names)]))
    return paths


def columns(line: str) -> list[str]:
    """The leading paths of a line, prose ends them. Of `heads.py (+ json)` the first word counts."""
    names = []
    for column in re.split(r"\s{2,}", line.strip()):
        word, _, rest = column.partition(" ")
        if (rest and not rest.startswith("(")) or not re.search(r"[./]\w|/$|^LICENSE$", word):
            break
        names.append(word)
    return names


def test_every_path_on_the_map_exists() -> None:
    gone = [path for path in paths_in_readme() if not any(REPO.glob(path.rstrip("/")))]
    assert not gone, f"README.md names {gone}, which are not there"


def test_every_room_is_on_the_map() -> None:
    rooms = {f"qr_integrations/{Path(f).parts[0]}" for f in FILES}
    missing = rooms - {path.rstrip("/") for path in paths_in_readme()}
    assert not missing, f"the tree in README.md lacks {sorted(missing)}"
