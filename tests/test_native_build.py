"""How the native engine is built, found and refused: native.py alone, in processes and caches of its own."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from fused_inr import native

NATIVE = Path(native.__file__)


def _run(code: str, **environment: str) -> str:
    """A fresh process that loads native.py without the package around it."""
    head = f"""
        import importlib.util
        spec = importlib.util.spec_from_file_location("native_alone", {str(NATIVE)!r})
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _has_compiler() -> bool:
    try:
        native.compiler()
    except RuntimeError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not _has_compiler(), reason="no C++ compiler")

# the smallest library that has a stamp: what stands in for the engine where only finding and refusing is tested
SMALL = 'extern "C" const char stamp[] = "FUSED_INR_STAMP={};"; extern "C" int answer() {{ return 42; }}'


def _small_library(target: Path, stamp: str) -> None:
    source = target.with_suffix(".cpp")
    source.write_text(SMALL.format(stamp))
    command, _ = native.compiler()
    subprocess.run([*command, "-shared", "-fPIC", str(source), "-o", str(target)], check=True)


@pytest.fixture
def own_cache(tmp_path):
    """A cache folder for a process, private as it must be."""
    return str(tmp_path / "cache")


def test_importing_native_is_light():
    code = """
        import sys
        assert "torch.utils.cpp_extension" not in sys.modules
        print(native.status())
    """
    assert "not loaded yet" in _run(code)


@needs_compiler
def test_the_engine_builds_into_an_empty_folder_and_works(tmp_path):
    target = tmp_path / "new" / "_C.so"
    code = f"""
        import torch
        native.build(native.Path({str(target)!r}), capabilities=("generic",))
        torch.ops.load_library({str(target)!r})
        ops = torch.ops.fused_inr_native
        x = torch.randn(9, 5)
        y, z = ops.linear_act(x, torch.eye(5), None, [], [2.0], "sine", True)
        assert torch.equal(z, x) and torch.allclose(y, torch.sin(2 * x), atol=1e-6)
        assert native.stamp_of(native.Path({str(target)!r})) == native._stamp(native.sources())
        print(ops.capability(), ops.capabilities())
    """
    assert _run(code) == "generic ['generic']"
    assert [p.name for p in target.parent.iterdir()] == ["_C.so"], "temporary files were left"


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("objdump"), reason="needs x86-64 and objdump")
def test_the_products_of_bfloat16_keep_their_sums_in_registers():
    """14 rows of two vectors: 28 sums, each in a register of its own, and nothing on the stack among the products."""
    if not native.load():
        pytest.skip(native.status()[1])
    command = ["objdump", "-d", "--no-show-raw-insn", "--no-addresses", str(native.status()[0])]
    code = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    lines = code.splitlines()
    blocks: list[list[int]] = [[]]
    for i, line in enumerate(lines):
        if "vdpbf16ps" in line:
            if blocks[-1] and i - blocks[-1][-1] > 8:
                blocks.append([])
            blocks[-1].append(i)
    whole = [block for block in blocks if len(block) == 28]
    assert whole, f"no block of 14 x 2 vectors among {[len(block) for block in blocks]}"
    for block in whole:
        assert len({lines[i].rpartition(",")[2] for i in block}) == 28
        assert not any("%rsp" in line or "%rbp" in line for line in lines[block[0] : block[-1]])


def test_a_library_for_another_torch_is_not_loaded(tmp_path):
    library = tmp_path / "old.so"
    _small_library(library, "torch 1.0.0 sources 0123456789abcdef")
    assert native.stamp_of(library) == "torch 1.0.0 sources 0123456789abcdef"
    assert not native._usable(library, native._stamp(native.sources()))
    _small_library(library, native._stamp(native.sources()))
    assert native._usable(library, native._stamp(native.sources()))


def test_a_damaged_library_is_not_loaded(tmp_path):
    library = tmp_path / "cut.so"
    for content in (b"", b"\x7fELF", b"FUSED_INR_STAMP=torch", b"FUSED_INR_STAMP=\xff\xfe;"):
        library.write_bytes(content)
        assert not native._usable(library, native._stamp(native.sources()))
    assert not native._usable(tmp_path / "absent.so", "")


def test_a_packaged_library_of_another_torch_gives_way_to_the_cache(tmp_path, own_cache):
    packaged = tmp_path / "_C.so"
    packaged.write_bytes(b"FUSED_INR_STAMP=torch 1.0.0 sources 0;")
    code = f"""
        native._PACKAGED = native.Path({str(packaged)!r})
        print(native.load(), native.status()[1])
    """
    # nothing in the cache and no compiler: the reason is the compiler, and the wrong library is not touched
    assert _run(code, XDG_CACHE_HOME=own_cache, CXX="/nonexistent/c++").startswith("False the C++ compiler")


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("/nonexistent/g++", "does not run"), ("false", "does not run")],
)
def test_a_broken_compiler_is_a_reason_and_not_an_exception(own_cache, compiler, reason):
    code = """
        native._PACKAGED = native.Path("/nonexistent/_C.so")
        assert native.load() is False and native.load() is False
        library, why = native.status()
        assert library is None
        print(why)
    """
    assert reason in _run(code, CXX=compiler, XDG_CACHE_HOME=own_cache)


def test_no_compiler_at_all_says_what_to_install(own_cache):
    code = """
        native._PACKAGED = native.Path("/nonexistent/_C.so")
        native.shutil.which = lambda name: None
        native.load()
        print(native.status()[1])
    """
    assert "install one, or set CXX" in _run(code, CXX="", XDG_CACHE_HOME=own_cache)


@needs_compiler
def test_a_compiler_that_fails_gives_its_first_error(tmp_path, own_cache):
    wrapper = tmp_path / "c++"
    wrapper.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo "c++ 1.0"; exit 0; }\necho "x.cpp:1: error: no" >&2\nexit 3\n'
    )
    wrapper.chmod(0o700)
    code = """
        native._PACKAGED = native.Path("/nonexistent/_C.so")
        native.load()
        print(native.status()[1])
    """
    reason = _run(code, CXX=str(wrapper), XDG_CACHE_HOME=own_cache)
    assert "exit code 3: x.cpp:1: error: no" in reason
    assert not list(Path(own_cache).rglob("*.so")), "a failed build left a library"
    assert not list(Path(own_cache).rglob(".build_*")), "a failed build left its folder"


def test_the_cache_is_private(tmp_path):
    folder = native.cache_folder(tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert native.cache_folder(tmp_path) == folder
    folder.chmod(0o777)
    with pytest.raises(RuntimeError, match="can be written by others"):
        native.cache_folder(tmp_path)
    folder.chmod(0o700)
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RuntimeError, match="is a link"):
        native.cache_folder(tmp_path)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give a folder away")
def test_a_cache_of_another_user_is_refused(tmp_path):
    os.chown(native.cache_folder(tmp_path), 12345, 12345)
    with pytest.raises(RuntimeError, match="belongs to another user"):
        native.cache_folder(tmp_path)


def test_two_builds_at_once_wait_for_each_other_and_a_killed_one_holds_nobody(tmp_path):
    path = tmp_path / "x.lock"
    hold = f"""if True:
        import fcntl, time
        f = open({str(path)!r}, "w")
        fcntl.flock(f, fcntl.LOCK_EX)
        print(1, flush=True)
        time.sleep(60)
    """
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    with native.one_at_a_time(path, patience=0.3):
        pass  # patience at its end: goes on without the lock
    holder.kill()
    holder.wait()
    with native.one_at_a_time(path, patience=60):
        pass


def test_a_library_in_the_cache_is_whole_or_built_again(tmp_path):
    library = tmp_path / "x.so"
    with native.Build(library) as build:
        (build.folder / "built").write_bytes(b"some bytes" * 1000)
        build.publish(build.folder / "built")
    assert native.whole(library)
    good = library.read_bytes()
    for bad in (b"", good[:-1], good[:4096], b"X" + good[1:]):
        library.write_bytes(bad)
        assert not native.whole(library), len(bad)
    library.write_bytes(good)
    assert native.whole(library)
    native._sum_file(library).write_bytes(b"")
    assert not native.whole(library)
    native._sum_file(library).unlink()
    assert not native.whole(library)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.so"], "the folder of the build was left"


@needs_compiler
@pytest.mark.parametrize("damage", [b"", b"\x7fELF" + bytes(60), "cut"], ids=["empty", "head only", "cut"])
def test_a_damaged_engine_in_the_cache_is_built_again(own_cache, damage):
    """The stamp alone does not tell: it may be in what a cut library has left."""
    code = f"""
        native._PACKAGED = native.Path("/nonexistent/_C.so")
        library = native.cached_library(capabilities=("generic",))
        whole, damage = library.read_bytes(), {damage!r}
        library.write_bytes(whole[:-4096] if damage == "cut" else damage)
        assert native.cached_library(capabilities=("generic",)) == library
        assert native.whole(library)
        print(native.stamp_of(library) == native._stamp(native.sources()), library.stat().st_size == len(whole))
    """
    # a compiler that takes no time: what is built is the stamp
    wrapper = Path(own_cache).parent / "c++"
    wrapper.write_text(
        """#!/bin/sh
[ "$1" = --version ] && { echo "c++ 1.0"; exit 0; }
for word; do case "$word" in -DFUSED_INR_STAMP=*) stamp=${word#*=};; esac; done
while [ "$1" != -o ]; do shift; done
case "$2" in *.so) cat "$(dirname "$2")/ops_library.o" > "$2"; head -c 65536 /dev/zero >> "$2";;
*) echo "FUSED_INR_STAMP=$stamp;" | tr -d '"' > "$2";; esac
"""
    )
    wrapper.chmod(0o700)
    assert _run(code, CXX=str(wrapper), XDG_CACHE_HOME=own_cache) == "True True"


@needs_compiler
@pytest.mark.parametrize("damage", ["empty", "cut", "other bytes"])
def test_a_damaged_library_of_a_formula_is_built_again(tmp_path, damage):
    if not native.load():
        pytest.skip(native.status()[1])
    native.compile_maps("test_native_build_damaged", SOURCE, cache=tmp_path)
    (library,) = (tmp_path / "fused_inr").glob("maps_*.so")
    whole = library.read_bytes()
    library.unlink()  # the loaded one keeps its file
    library.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "other bytes": b"\0" * len(whole)}[damage])
    assert all(native.compile_maps("test_native_build_damaged", SOURCE, cache=tmp_path)[3:])
    assert native.whole(library) and len(library.read_bytes()) > len(whole) // 2


def test_a_damaged_packaged_library_gives_way_to_the_cache(tmp_path, own_cache):
    packaged = tmp_path / "_C.so"
    packaged.write_bytes(f"FUSED_INR_STAMP={native._stamp(native.sources())};".encode())
    code = f"""
        native._PACKAGED = native.Path({str(packaged)!r})
        print(native.load(), native.status()[1])
    """
    assert _run(code, XDG_CACHE_HOME=own_cache, CXX="/nonexistent/c++").startswith("False the C++ compiler")


SLOW_COMPILER = """#!/bin/sh
[ "$1" = --version ] && { echo "c++ 1.0"; exit 0; }
sleep 600 &
echo $! >> "$PIDS"
wait
"""


@pytest.mark.parametrize("stop", ["SIGINT", "SIGKILL"])
def test_a_build_that_is_stopped_leaves_nothing_for_long(tmp_path, own_cache, stop):
    """Ctrl-C ends compilers and their children and removes the folder; what a killed one leaves, the next one does."""
    wrapper, pids = tmp_path / "c++", tmp_path / "pids"
    wrapper.write_text(SLOW_COMPILER)
    wrapper.chmod(0o700)
    code = """
        native._PACKAGED = native.Path("/nonexistent/_C.so")
        native.load()
    """
    head = f"""if True:
        import importlib.util, signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs tests in parallel may ignore it
        spec = importlib.util.spec_from_file_location("native_alone", {str(NATIVE)!r})
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
    """
    environment = {**os.environ, "CXX": str(wrapper), "XDG_CACHE_HOME": own_cache, "PIDS": str(pids)}
    process = subprocess.Popen([sys.executable, "-c", head + code], env=environment, stderr=subprocess.DEVNULL)
    while not (pids.exists() and pids.read_text().count("\n") >= 2):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(getattr(signal, stop))
    process.wait(timeout=120)
    cache = Path(own_cache) / "fused_inr"
    left = list(cache.glob(".build_*"))
    children = [int(word) for word in pids.read_text().split()]
    if stop == "SIGINT":
        assert not left
        assert not any(_runs(pid) for pid in children)
        return
    assert len(left) == 1
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    with native.Build(cache / "other.so"), native.Build(cache / "another.so") as build:
        assert len(list(cache.glob(".build_*"))) == 2  # those of the two: what is held stays
        assert build.folder.exists()
    assert not list(cache.glob(".build_*"))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_build_that_fails_ends_the_others(tmp_path):
    script = tmp_path / "c++"
    script.write_text('#!/bin/sh\n[ "$1" = bad ] && { echo "x.cpp:1: error: no" >&2; exit 3; }\nexec sleep 600\n')
    script.chmod(0o700)
    with (
        pytest.raises(RuntimeError, match=r"exit code 3: x\.cpp:1: error: no"),
        native.Build(tmp_path / "x.so") as build,
    ):
        build.run([[str(script), "bad"], [str(script), "good"], [str(script), "good"]])
    assert not list(tmp_path.glob(".build_*"))


# -- a user's formula


SOURCE = """
namespace fused_inr {
template <class V> FI_INLINE void cubic_l0(const V* in, V* out) { out[0] = in[1] * in[0] * in[0] * in[0]; }
template <class V> FI_INLINE void cubic_l1(const V* in, V* out) {
  out[0] = fi_const<V>(3.0) * in[1] * in[0] * in[0] * in[2];
}
template <class V> FI_INLINE void cubic_l2(const V* in, V* out) {
  out[0] = fi_const<V>(6.0) * in[1] * in[0] * in[2] * in[3];
  out[1] = fi_const<V>(3.0) * in[1] * in[0] * in[0] * in[3];
}
template <class V> FI_INLINE void cubic_l3(const V* in, V* out) { out[0] = out[1] = out[2] = fi_tan(in[0]); }
template <class V> FI_INLINE void cubic_p1(const V* in, V* out) {
  cubic_l1(in, out);
  out[1] = in[0] * in[0] * in[0] * in[2];
}
template <class V> FI_INLINE void cubic_p2(const V* in, V* out) { out[0] = out[1] = out[2] = in[0]; }
}
template <class V> FI_INLINE void cubic_j(const V* in, V* out) {
  cubic_l0(in, out);
  const V third = in[1] * in[0] * in[0];
  out[1] = third + third + third;
}
template <class V> FI_INLINE void cubic_jp(const V* in, V* out) {
  cubic_j(in, out);
  out[2] = in[0] * in[0] * in[0];
}
#define FUSED_INR_ACTIVATIONS(X) X(cubic, 1, 1, 1)
"""


@needs_compiler
def test_compile_maps(tmp_path):
    if not native.load():
        pytest.skip(native.status()[1])
    table = native.compile_maps("test_native_build_cubic", SOURCE, cache=tmp_path)
    assert isinstance(table, ctypes.Array)
    assert list(table[:3]) == [1, 1, 1]
    assert all(table[3:])
    ops = torch.ops.fused_inr_native
    assert ops.has_activation("test_native_build_cubic", 3, False)
    assert not ops.has_activation("test_native_build_cubic", 3, True)
    for dtype in (torch.float32, torch.float64):
        z = torch.randn(37, 11, dtype=dtype)
        weight = torch.eye(11, dtype=dtype)
        y, _ = ops.linear_act(z, weight, None, [], [0.5], "test_native_build_cubic", False)
        torch.testing.assert_close(y, 0.5 * z**3)
        g = torch.randn_like(z)
        gx, _, _, gp = ops.linear_act_backward(
            g, z, weight, None, [], [0.5], None, "test_native_build_cubic", [True, False, False, True]
        )
        torch.testing.assert_close(gx, 1.5 * z**2 * g)
        torch.testing.assert_close(gp, (z**3 * g).sum(0, keepdim=True), rtol=1e-4, atol=1e-5)
    # the second time it comes from the cache
    libraries = list((tmp_path / "fused_inr").glob("maps_*.so"))
    assert len(libraries) == 1
    written = libraries[0].stat().st_mtime_ns
    native.compile_maps("test_native_build_cubic", SOURCE, cache=tmp_path)
    assert libraries[0].stat().st_mtime_ns == written


@needs_compiler
def test_an_error_in_a_formula_is_told(tmp_path):
    if not native.load():
        pytest.skip(native.status()[1])
    with pytest.raises(RuntimeError, match="error"):
        native.compile_maps("broken", SOURCE.replace("fi_tan", "fi_no_such"), cache=tmp_path)
    assert not list(tmp_path.rglob("maps_*.so"))


def test_a_built_in_name_cannot_be_taken():
    if not native.load():
        pytest.skip(native.status()[1])
    ops = torch.ops.fused_inr_native
    with pytest.raises(ValueError, match="built-in"):
        ops.register_activation("sine", 1, 1, 1, [0] * 16)
    with pytest.raises(ValueError, match="16 addresses"):
        ops.register_activation("mine", 1, 1, 1, [0])
    with pytest.raises(ValueError, match="at least 1, 1, 0"):
        ops.register_activation("mine", 0, 1, 1, [0] * 16)
