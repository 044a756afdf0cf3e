"""Compiled kernels: only what this user's compiler wrote is ever loaded, and a missing compiler is one sentence."""

import ctypes
import itertools
import os
import subprocess
import warnings
from pathlib import Path

import pytest

from bevfn import compile
from bevfn.kernels import native

ANSWER = 'extern "C" int answer() {{ return {}; }}'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache's folder, and what `load` says from it as in a new process."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("BEVFN_CACHE", str(folder))
    source = tmp_path / "op" / "cpu.cpp"
    source.parent.mkdir()
    source.write_text(ANSWER.format(42))

    copies = itertools.count()

    def by_new_name(path: str) -> ctypes.CDLL:
        """As a new process loads it: the loader of this one never reads a path twice."""
        copy = tmp_path / f"{next(copies)}.so"
        copy.write_bytes(Path(path).read_bytes())
        return ctypes_cdll(str(copy))

    ctypes_cdll = ctypes.CDLL
    monkeypatch.setattr(native.ctypes, "CDLL", by_new_name)

    def answer() -> int:
        native.load.cache_clear()
        return native.load(source).answer()

    yield folder, answer
    native.load.cache_clear()
    native.private_folder.cache_clear()


def planted(folder: Path) -> Path:
    """The cached library, replaced by another that works."""
    (library,) = folder.glob("*.so")
    (folder / "evil.cpp").write_text(ANSWER.format(666))
    subprocess.run(["g++", "-shared", "-fPIC", folder / "evil.cpp", "-o", folder / "evil.so"], check=True)
    os.replace(folder / "evil.so", library)
    return library


def test_a_folder_where_nothing_may_run_is_named(cache, monkeypatch):
    folder, answer = cache

    def refuse(path: str) -> ctypes.CDLL:
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(native.ctypes, "CDLL", refuse)
    with pytest.raises(OSError, match=rf"^{folder}.*: set BEVFN_CACHE to a folder that is not mounted noexec"):
        answer()


def test_a_library_that_is_not_what_was_built_is_built_again(cache):
    folder, answer = cache
    assert answer() == 42
    planted(folder)
    assert answer() == 42
    (library,) = folder.glob("*.so")
    made = library.stat().st_mtime_ns
    assert answer() == 42 and library.stat().st_mtime_ns == made  # what is right stays


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_half_written_library_is_built_again(cache, size):
    folder, answer = cache
    assert answer() == 42
    whole = next(folder.glob("*.so")).read_bytes()
    library = next(folder.glob("*.so"))
    library.unlink()
    library.write_bytes(whole[:size])  # were it mapped, the process could die of SIGBUS
    assert answer() == 42


def with_digest(library: Path) -> None:
    """As somebody would who knows how the cache works."""
    native._digest_file(library).write_text(native.hashlib.sha256(library.read_bytes()).hexdigest())


def everybodys_folder(folder: Path, library: Path) -> None:
    folder.chmod(0o777)


def everybodys_library(folder: Path, library: Path) -> None:
    library.chmod(0o777)


def somebodys_library(folder: Path, library: Path) -> None:
    os.chown(library, 12345, 12345)


def somebodys_folder(folder: Path, library: Path) -> None:
    os.chown(folder, 12345, 12345)


@pytest.mark.parametrize("whose", [everybodys_folder, everybodys_library, somebodys_library, somebodys_folder])
def test_planted_code_is_not_run(cache, whose):
    if os.getuid() and whose in (somebodys_library, somebodys_folder):
        pytest.skip("only root can give files away")
    folder, answer = cache
    assert answer() == 42
    library = planted(folder)
    with_digest(library)
    assert answer() == 666  # the attack works where only this user can have made it
    whose(folder, library)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert answer() == 42
    if whose in (everybodys_folder, somebodys_folder):
        (sentence,) = {str(w.message) for w in said}
        assert str(folder) in sentence and "set BEVFN_CACHE to a folder of your own" in sentence
        assert native.private_folder().stat().st_mode & 0o777 == 0o700


def test_a_folder_in_everybodys_but_sticky_tmp_is_trusted(tmp_path):
    tmp_path.chmod(0o1777)
    (tmp_path / "mine").mkdir(mode=0o700)
    assert native.untrusted(tmp_path / "mine") is None
    tmp_path.chmod(0o777)
    assert "may write" in native.untrusted(tmp_path / "mine")


def test_inductor_leaves_a_cache_that_others_may_write(tmp_path, monkeypatch):
    folder = tmp_path / "torchinductor"
    folder.mkdir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    compile._trust_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
    folder.chmod(0o777)
    with pytest.warns(UserWarning, match="may write .*torchinductor: set TORCHINDUCTOR_CACHE_DIR"):
        compile._trust_cache()
    assert native.untrusted(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent) is None
    native.private_folder.cache_clear()


def test_no_compiler_is_one_sentence(cache, monkeypatch):
    _, answer = cache
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(OSError, match=r"need a C\+\+17 compiler and 'g\+\+' is not on PATH: install g\+\+"):
        answer()


def test_no_compiler_is_one_sentence_before_inductor_compiles(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(OSError, match=r"not on PATH: install g\+\+"):
        compile.function(lambda x: x + 1, backend="inductor")
