"""The longer runs. Each session is named in CONTRIBUTING.md."""

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "types", "tests"]

TORCH = "torch==2.13.0"
CPYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]


@nox.session
def tests(session):
    """Run the suite."""
    session.install(TORCH)
    session.install(".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def slow(session):
    """Run the soaks that the suite leaves out."""
    session.install(TORCH)
    session.install(".[test]")
    session.run("pytest", "-m", "slow", *session.posargs)


@nox.session(python=CPYTHONS)
def numpy(session):
    """Test the NumPy side on each CPython found, with no torch installed."""
    session.install(".", "pytest", "hypothesis")
    session.run("pytest", *session.posargs)


@nox.session
def lint(session):
    """Run ruff and clang-format."""
    session.install("ruff", "clang-format")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run(
        "bash",
        "-c",
        "clang-format --dry-run -Werror "
        "$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.inl' 'csrc/*.cu' 'tests/*.cpp')",
        external=True,
    )


@nox.session
def types(session):
    """Check types, and the stubs against the compiled module."""
    session.install(TORCH)
    session.install(".", "mypy")
    session.run("mypy")
    session.run("stubtest", "fastlstm._core")


@nox.session
def tiles(session):
    """Test the kernels on AMX tiles and on dots where the CPU has AVX-512 but not these."""
    session.install(TORCH)
    emulate = "-Ccmake.define.FASTLSTM_EMULATE_TILES=ON"
    session.install(".[test]", emulate, env={"FASTLSTM_CUDA": "off"})
    files = ["kernels", "half", "plan", "threads", "numpy", "steps"]
    session.run("pytest", *(session.posargs or [f"tests/test_{name}.py" for name in files]))


@nox.session
def sanitize(session):
    """Run the suite under AddressSanitizer and UndefinedBehaviorSanitizer."""
    session.install(TORCH)
    session.install(".[test]", "-Ccmake.define.FASTLSTM_SANITIZE=address,undefined")
    runtimes = [
        session.run("g++", f"-print-file-name={name}", external=True, silent=True).strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    session.run(
        "pytest",
        *session.posargs,
        env={
            # Python itself is not built with them, so they come first by preloading.
            "LD_PRELOAD": " ".join(runtimes),
            # CPython and torch leak by design at exit; the tests ask for impossible sizes.
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
    )


@nox.session
def benchmark(session):
    """Run the benchmark beside every peer."""
    session.install(TORCH)
    session.install(".[bench]")
    session.run("python", "benchmarks/compare.py", *session.posargs)
