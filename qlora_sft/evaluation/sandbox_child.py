"""Runs a command that sees no network, none of the user's files and no other process: Linux's namespaces.

Run as ``python -I sandbox_child.py FOLDER PATH ... -- COMMAND ...``. The command finds the PATHs, read-only, the
devices of `DEVICES`, and an empty folder `WORK` in memory, which is its current folder. FOLDER is an empty folder over
which the new root is built; nothing is written into it. `sandbox.command` starts this file by its path in a process of
its own, so it imports nothing but the standard library. Ends with the exit code of the command, or 128 and the number
of the signal that ended it. See namespaces(7), user_namespaces(7) and pivot_root(2).
"""

import ctypes
import os
import signal
import sys

WORK = "/sandbox"
WORK_BYTES = 64 * 2**20
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
NOBODY = 65534

NEW_MOUNTS, NEW_UTS, NEW_IPC, NEW_USERS, NEW_PIDS, NEW_NETWORK = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
READ_ONLY, NO_SUID, NO_DEVICES, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
NO_PROGRAMS, NO_ACCESS_TIMES, RELATIVE = 8, 1024 | 2048, 1 << 21
DETACH = 2
DIE_WITH_PARENT, NO_NEW_PRIVILEGES = 1, 38

libc = ctypes.CDLL(None, use_errno=True)


def main(folder: str, paths: list[str], command: list[str]) -> int:
    """Shuts this process in, runs the command in a process below it, and returns its exit code."""
    as_root = leave_namespaces()
    build_root(folder, paths)
    os.chdir(WORK)
    # The first process of a namespace ignores signals that it does not handle, so the command must not be that one.
    first = os.fork()
    if first:
        return exit_code(os.waitpid(first, 0)[1])
    # When this process dies, all others in its namespace are killed.
    call(libc.prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0), "prctl")
    second = os.fork()
    if second:
        while True:  # also collects what the command has left behind
            child, status = os.wait()
            if child == second:
                return exit_code(status)
    if as_root:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    call(libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
    os.execv(command[0], command)


def leave_namespaces() -> bool:
    """Moves into new namespaces and returns whether that was done as root, without a namespace of users.

    Other users may do so only in a new namespace of users, in which this one becomes nobody.
    """
    new = NEW_MOUNTS | NEW_UTS | NEW_IPC | NEW_PIDS | NEW_NETWORK
    if os.getuid() == 0 and libc.unshare(new) == 0:
        return True
    user, group = os.getuid(), os.getgid()
    call(libc.unshare(new | NEW_USERS), "unshare")
    for file, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"), ("gid_map", f"{NOBODY} {group} 1")):
        with open(f"/proc/self/{file}", "w") as control:
            control.write(text)
    return False


def build_root(folder: str, paths: list[str]) -> None:
    """Makes a root of ``paths``, the devices and an empty `WORK`, and leaves the old one for good."""
    mount(None, "/", None, PRIVATE | RECURSIVE)
    mount("tmpfs", folder, "tmpfs", NO_SUID | NO_DEVICES, "size=1m,mode=755")
    for path in [*paths, *DEVICES]:
        place = folder + path
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), place)
            continue
        if os.path.isdir(path):
            os.makedirs(place, exist_ok=True)
        else:
            open(place, "w").close()
        mount(path, place, None, BIND | RECURSIVE)
    make_read_only(folder)
    os.makedirs(folder + WORK)
    mount("tmpfs", folder + WORK, "tmpfs", NO_SUID | NO_DEVICES, f"size={WORK_BYTES},mode=777")
    os.chdir(folder)
    call(libc.pivot_root(b".", b"."), "pivot_root")
    call(libc.umount2(b".", DETACH), "umount2")
    os.chdir("/")
    mount(None, "/", None, REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEVICES)


def make_read_only(folder: str) -> None:
    """Makes every mount below ``folder`` read-only, those that came along with their folder included."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        places = [line.split(" ")[4].encode("latin-1", "surrogateescape").decode("unicode_escape") for line in table]
    for place in places:
        if place.startswith(folder + "/"):
            # What a mount forbids already may not be allowed by mounting it anew.
            found = os.statvfs(place).f_flag
            kept = found & (NO_SUID | NO_DEVICES | NO_PROGRAMS | NO_ACCESS_TIMES) | (RELATIVE if found & 4096 else 0)
            mount(None, place, None, REMOUNT | BIND | READ_ONLY | kept)


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Calls mount(2) and raises OSError where it fails."""
    source_, target_, kind_, data_ = (
        None if text is None else os.fsencode(text) for text in (source, target, kind, data)
    )
    call(libc.mount(source_, target_, kind_, ctypes.c_ulong(flags), data_), f"mount {target}")


def call(result: int, what: str) -> None:
    """Raises OSError if a function of the C library did not return 0."""
    if result:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def exit_code(status: int) -> int:
    """Returns the exit code of a process, or 128 and the number of the signal that ended it."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


if __name__ == "__main__":
    end = sys.argv.index("--")
    code = main(sys.argv[1], sys.argv[2:end], sys.argv[end + 1 :])
    os._exit(code)
