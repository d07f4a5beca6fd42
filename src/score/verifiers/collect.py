# Reads a row's tests before any program runs: which tests the text defines without running them, and whether anything in it
# can fail. harness.py follows this file and runs them.
import ast
import builtins
import sys

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = FUNCTIONS + (ast.ClassDef,)
RUNNERS = ("unittest", "pytest")
# What pytest supplies to tests, and what it calls around them.
SUPPLIED = {"fixture", "parametrize", "usefixtures"}
AROUND = {f"{when}_{what}" for when in ("setup", "teardown") for what in ("module", "function", "class")}


class Unusable(Exception):
    """The tests cannot be run, or no program can fail them."""


def walk(nodes, closed=()):
    """These nodes and their descendants, except what is inside nodes of the `closed` kinds, and constants (tests may hold many)."""
    left = list(nodes)
    while left:
        node = left.pop()
        yield node
        if isinstance(node, closed):
            continue
        for field in node._fields:
            value = getattr(node, field, None)
            for one in value if type(value) is list else (value,):
                if isinstance(one, ast.AST) and not isinstance(one, (ast.Constant, ast.expr_context)):
                    left.append(one)


def inside(body):
    """Everything that these statements execute: definitions, but not the bodies that they define."""
    return walk(body, DEFINITIONS + (ast.Lambda,))


def names(nodes, use):
    """The names that are read (`ast.Load`) or assigned to (`ast.Store`)."""
    return [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, use)]


def words(expressions):
    """All names and attributes in expressions."""
    parts = list(walk(expressions))
    return set(names(parts, ast.Load)) | {part.attr for part in parts if isinstance(part, ast.Attribute)}


def needed(function, bound):
    """The parameters that a call must supply; for a `bound` method, without the instance."""
    given = function.args
    by_place = [one.arg for one in getattr(given, "posonlyargs", []) + given.args]
    by_place = by_place[int(bound) : len(by_place) - len(given.defaults)]
    return by_place + [one.arg for one, default in zip(given.kwonlyargs, given.kw_defaults) if default is None]


def imported(nodes, modules):
    """What imports from these modules bind: (name in the module, name here), the first of them "" for a module."""
    bound = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            bound.update(("", one.asname or one.name) for one in node.names if one.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            bound.update((one.name, one.asname or one.name) for one in node.names)
    return bound


def is_guard(node):
    """`if __name__ == "__main__":`."""
    test = node.test if isinstance(node, ast.If) else None
    if not isinstance(test, ast.Compare) or [type(one) for one in test.ops] != [ast.Eq]:
        return False
    sides = [test.left] + test.comparators
    texts = [side.value for side in sides if isinstance(side, ast.Constant)]
    return names(sides, ast.Load) == ["__name__"] and texts == ["__main__"]


def without_runners(tree):
    """Removes `unittest.main()` and `pytest.main()`, which would look for tests elsewhere and end the process, and unwraps
    `if __name__ == "__main__":` blocks so that they run."""
    nodes = list(walk(tree.body))
    bound = imported(nodes, RUNNERS)

    def runs(node):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
            return called.attr == "main" and ("", called.value.id) in bound
        return isinstance(called, ast.Name) and ("main", called.id) in bound

    def kept(statement):
        if is_guard(statement):
            return [one for inner in statement.body for one in kept(inner)]
        # Also within `sys.exit(…)` and `raise SystemExit(…)`.
        if isinstance(statement, (ast.Expr, ast.Raise)) and any(map(runs, walk([statement]))):
            return [ast.copy_location(ast.Pass(), statement)]
        return [statement]

    for node in [tree] + nodes:
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                setattr(node, field, [one for statement in block for one in kept(statement)])


def check_test(name, function, bound):
    """Rejects a test that needs something from pytest, and one whose call would run nothing."""
    supplied = SUPPLIED & words(function.decorator_list)
    if supplied:
        raise Unusable(f"`{name}` needs pytest's `{min(supplied)}`, which is not understood")
    missing = needed(function, bound)
    # A decorator may supply them, as `unittest.mock.patch` does.
    if missing and not function.decorator_list:
        raise Unusable(f"`{name}` needs `{missing[0]}`, but tests are called without arguments")
    if any(isinstance(node, (ast.Yield, ast.YieldFrom)) for node in inside(function.body)):
        raise Unusable(f"`{name}` yields, so that a call of it runs nothing")


def check_around(defined):
    """Rejects pytest hooks that would have to be called around tests."""
    around = AROUND & set(defined)
    if around:
        raise Unusable(f"`{min(around)}` is called only by pytest, which does not run here")


class Tests:
    """The tests to run after the text, by name.

    `functions` are called. `classes` are run by unittest if they are its own; for others the listed methods are called, each
    on its own instance. `own_fail`: whether the text's own statements can fail.
    """

    def __init__(self, tree):
        nodes = list(walk(tree.body))
        self.own = list(inside(tree.body))
        self.mentioned = set(names(self.own, ast.Load))
        self.everywhere = names(nodes, ast.Load)
        self.functions, self.classes = {}, {}
        # The names of unittest's classes here, and of those that run async tests.
        aliases = imported(nodes, RUNNERS)
        self.cases = {"TestCase"} | {here for there, here in aliases if there == "TestCase"}
        self.async_cases = {"IsolatedAsyncioTestCase"}
        self.is_async = any(isinstance(node, ast.AsyncFunctionDef) for node in nodes)
        self.has_methods = False
        defined = [node for node in self.own if isinstance(node, DEFINITIONS)]
        defined.sort(key=lambda node: node.lineno)
        check_around(node.name for node in defined)
        for node in defined:
            (self.add_class if isinstance(node, ast.ClassDef) else self.add_function)(node)
        self.own_fail = self.can_fail()
        if not (self.own_fail or self.functions or self.classes and self.has_methods):
            idle = [node.name for node in defined if isinstance(node, FUNCTIONS)]
            what = f"`{idle[0]}` is never called" if idle else "there is no assertion"
            raise Unusable(f"no program can fail them: {what}, no function `test_…` and no TestCase")

    def add_function(self, node):
        name = node.name
        if "fixture" in words(node.decorator_list):
            raise Unusable(f"`{name}` is a fixture of pytest's, which is not understood")
        # Functions that the text's own statements mention are called by them.
        if not name.startswith("test") or name in self.mentioned:
            return
        helps = self.everywhere.count(name) > names(walk([node]), ast.Load).count(name)
        if helps and needed(node, False) and not node.decorator_list:
            return
        check_test(name, node, False)
        self.functions[name] = None

    def add_class(self, node):
        methods = {one.name: one for one in inside(node.body) if isinstance(one, FUNCTIONS)}
        tests = {name: one for name, one in methods.items() if name.startswith("test") or name == "runTest"}
        # A unittest class may inherit its tests.
        self.has_methods = self.has_methods or bool(tests)
        bases = words(node.bases)
        if bases & self.async_cases:
            self.async_cases.add(node.name)
        is_case = bool(bases & (self.cases | self.async_cases))
        if is_case:
            self.cases.add(node.name)
        # By pytest's rule.
        is_plain = node.name.startswith("Test") and "__init__" not in methods and node.name not in self.mentioned
        if not (is_case or is_plain and tests):
            return
        for name, one in tests.items():
            check_test(f"{node.name}.{name}", one, True)
            if is_case and isinstance(one, ast.AsyncFunctionDef) and node.name not in self.async_cases:
                raise Unusable(f"`{node.name}.{name}` is async, but its class is no IsolatedAsyncioTestCase")
        if not is_case:
            check_around(methods)
        self.classes[node.name] = list(tests)

    def can_fail(self):
        """An assertion, or a name that the text does not assign itself, other than builtins and standard-library modules."""
        inert = set(dir(builtins)) - {"exec", "eval", "globals", "locals", "vars", "__import__"}
        inert.update(names(self.own, ast.Store))
        library = getattr(sys, "stdlib_module_names", sys.builtin_module_names)
        inert.update(here for there, here in imported(self.own, library) if not there)
        return bool(self.mentioned - inert) or any(isinstance(node, (ast.Assert, ast.Raise)) for node in self.own)


def collect(text):
    """The compiled text and the tests to run after it."""
    tree = ast.parse(text, "tests")
    if "main" in text:
        without_runners(tree)
        return compile(tree, "tests", "exec"), Tests(tree)
    return compile(text, "tests", "exec"), Tests(tree)
