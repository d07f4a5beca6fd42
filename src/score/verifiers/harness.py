# Runs an answer's program and then the row's tests; if all pass, prints a word that the program does not know.
# Arguments: bytes of the program, bytes of the tests, the word that signals that the sandbox is up.
# The word for success follows both on standard input, so a program that exits early has not seen it.
# Before the program runs, exits with 3 if the input ends early, 4 if the tests are not valid Python, and 5 if they cannot be
# run or no program can fail them; the last line of standard error says why. collect.py precedes this file.


def unittest_runner():
    """A function that runs a `unittest.TestCase` class and returns how many of its tests ran, and the base class."""
    import unittest

    load, find, kind = unittest.TestLoader().loadTestsFromTestCase, getattr, type

    class Result(unittest.TestResult):
        ran = 0

        def addSkip(self, test, reason):
            # The text may mark a test to be skipped; a program under test that skips it fails it.
            method = find(test, find(test, "_testMethodName", ""), None)
            if find(kind(test), "__unittest_skip__", False) or find(method, "__unittest_skip__", False):
                return
            self.failures.append((test, f"skipped: {reason}"))
            self.stop()

        def addSuccess(self, test):
            self.ran += 1

        def addExpectedFailure(self, test, error):
            self.ran += 1

    def run_case(case):
        result = Result()
        result.failfast = True
        load(case).run(result)
        for _, error in result.failures + result.errors:
            raise AssertionError(error)
        if not result.wasSuccessful():
            raise AssertionError("a test passed that is expected to fail")
        return result.ran

    return run_case, unittest.TestCase


def runner(tests):
    """A function that runs the tests that the text defined and did not call. Made before the program runs, because that may
    change every builtin and module."""
    functions, classes, own_fail = list(tests.functions), list(tests.classes.items()), tests.own_fail
    kind, inherits, has, find = type, issubclass, hasattr, getattr
    coroutine = run_loop = run_case = TestCase = None
    if tests.is_async:
        import asyncio
        import types

        coroutine, run_loop = types.CoroutineType, asyncio.run
    if classes:
        run_case, TestCase = unittest_runner()

    def call(function, *arguments):
        outcome = function(*arguments)
        if kind(outcome) is coroutine:
            run_loop(outcome)

    def run_method(instance, name):
        method = find(instance, name)
        for around in ("setup_method", name, "teardown_method"):
            if has(instance, around):
                code = find(find(instance, around), "__code__", None)
                takes_method = around != name and find(code, "co_argcount", 1) > 1
                call(find(instance, around), *([method] if takes_method else []))

    def run_found(space):
        ran = 0
        for name in functions:
            # Tests that the text marks as skipped do not count.
            if name in space and not find(space[name], "__unittest_skip__", False):
                call(space[name])
                ran += 1
        for name, methods in classes:
            if name not in space:
                continue
            if inherits(space[name], TestCase):
                ran += run_case(space[name])
                continue
            for method in methods:
                run_method(space[name](), method)
                ran += 1
        if not (ran or own_fail):
            raise AssertionError("no test ran")

    return run_found


def run():
    import linecache
    import os
    import traceback
    import types

    # The program must not see inherited files.
    os.closerange(3, 4096)
    read, write, leave, execute = os.read, os.write, os._exit, exec
    program_size, tests_size, ready = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    text = b""
    while len(text) < program_size + tests_size:
        part = read(0, program_size + tests_size - len(text))
        if not part:
            leave(3)
        text += part
    tests = text[program_size:].decode()
    # Compiled first: the program may change every builtin. Invalid Python raises a SyntaxError, a ValueError (null
    # bytes), a MemoryError or a RecursionError (both: too deep).
    try:
        compiled, found = collect(tests)
    except Unusable as error:
        write(2, f"{error}\n".encode())
        leave(5)
    except Exception:
        traceback.print_exc()
        leave(4)
    run_found = runner(found)
    # Its tree may be large.
    del found
    lines = {"tests": (len(tests), None, tests.splitlines(True), "tests")}
    word, out = os.dup(0), os.dup(1)
    nothing = os.open("/dev/null", os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.argv = ["answer.py"]
    module = types.ModuleType("answer")
    sys.modules["answer"] = module
    space = module.__dict__
    flush_out, flush_err, show = sys.stdout.flush, sys.stderr.flush, traceback.print_exc
    write(2, ready.encode() + b"\n")
    try:
        execute(compile(text[:program_size].decode(), "answer.py", "exec"), space)
        # For the lines in tracebacks.
        linecache.cache.update(lines)
        execute(compiled, space)
        run_found(space)
        flush_out()
        flush_err()
    except BaseException:
        show()
        for flush in (flush_err, flush_out):
            try:
                flush()
            except BaseException:
                # The program closed it.
                pass
        leave(1)
    answer = b""
    while part := read(word, 64):
        answer += part
    write(out, answer)
    leave(0)


run()
