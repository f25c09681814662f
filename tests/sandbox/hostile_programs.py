"""Programs that try to get out, to stay, to flood, or to lie. Each prints ESCAPED if it succeeds.

One entry: name, the statuses that are right for it, and the source. ``attempt(action)`` is put before each source: it
prints ESCAPED if the action raises no OSError. Programs given "ok" are to be stopped and then live on.
"""

from __future__ import annotations

PRELUDE = """
import ctypes, errno, os, signal, socket, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def attempt(action):
    try:
        result = action()
    except (OSError, ImportError, AttributeError):
        return
    print("ESCAPED", result)
def syscall(*arguments):
    result = libc.syscall(*[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result
"""

PROGRAMS: dict[str, tuple[tuple[str, ...], str]] = {
    # --- using up the machine
    "fork bomb": (("error",), "while True: os.fork()"),
    "fork bomb that goes on": (("timeout",), """
while True:
    try: os.fork()
    except OSError: pass
"""),
    "thread bomb": (("error", "memory"), """
import threading
while True: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
"""),
    "memory flood": (("memory",), "data = bytearray(1 << 40)"),
    "memory flood in small pieces": (("memory", "error"), """
data = []
while True: data.append(bytes(1 << 20))
"""),
    "memory flood by mmap": (("ok",), """
import mmap
kept = []
try:
    while len(kept) < 4096: kept.append(mmap.mmap(-1, 1 << 20))
    print("ESCAPED")
except (OSError, MemoryError): pass
"""),
    "memory flood by memfd": (("ok",), "attempt(lambda: os.memfd_create('x'))"),
    "memory flood by System V": (("ok",), "attempt(lambda: syscall(29, 0, 1 << 20, 0o1777))"),
    "memory locked": (("ok",), "attempt(lambda: syscall(149, id(libc) & ~4095, 4096))"),
    "disk flood": (("ok", "error"), """
try:
    for n in range(100):
        with open(f"file{n}", "wb") as file: file.write(bytes(1 << 20))
    print("ESCAPED")
except OSError: pass
"""),
    "flood of small files": (("ok", "error"), """
try:
    for n in range(5000): open(f"file{n}", "w").close()
    print("ESCAPED")
except OSError: pass
"""),
    "deep directories": (("ok", "error"), """
try:
    for n in range(5000):
        os.mkdir("d"); os.chdir("d")
    print("ESCAPED")
except OSError: pass
"""),
    "huge standard output": (("output",), "while True: sys.stdout.write('x' * 65536)"),
    "huge standard error": (("output",), "while True: sys.stderr.write('x' * 65536)"),
    "endless loop": (("timeout",), "while True: pass"),
    "endless loop in C": (("timeout",), "sum(range(10 ** 12))"),
    "sleeping": (("timeout",), "time.sleep(1000)"),
    "stopped": (("timeout", "error"), """
os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(1000)
"""),
    "waiting for input for ever": (("timeout",), """
r, w = os.pipe()
os.read(r, 1)
"""),
    "processor limit lifted": (("timeout",), """
import resource
try: resource.setrlimit(resource.RLIMIT_CPU, (10 ** 6, 10 ** 6)); print("ESCAPED")
except (OSError, ValueError): pass
while True: pass
"""),
    "signals ignored": (("timeout",), """
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
"""),
    "open files": (("error",), """
kept = []
while True: kept.append(os.pipe())
"""),
    # --- the network
    "TCP": (("ok",), "attempt(lambda: socket.create_connection(('1.1.1.1', 53), 2))"),
    "TCP to this machine": (("ok",), "attempt(lambda: socket.create_connection(('127.0.0.1', LISTENING), 2))"),
    "UDP": (("ok",), """
attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('1.1.1.1', 53)))
"""),
    "IPv6": (("ok",), "attempt(lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM))"),
    "name service": (("ok",), "attempt(lambda: socket.getaddrinfo('example.com', 80))"),
    "unix sockets": (("ok",), "attempt(lambda: socket.socket(socket.AF_UNIX).connect('/run/systemd/notify'))"),
    "abstract sockets": (("ok",), """
attempt(lambda: socket.socket(socket.AF_UNIX).connect(ABSTRACT))
"""),
    "address given to a socket pair": (("ok",), """
a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
attempt(lambda: a.sendto(b"x", ABSTRACT))
attempt(lambda: a.sendmsg([b"x"], [], 0, ABSTRACT))
"""),
    "raw and packet sockets": (("ok",), """
attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
attempt(lambda: socket.socket(17, socket.SOCK_RAW, 3))
attempt(lambda: socket.socket(16, socket.SOCK_RAW, 0))
attempt(lambda: socket.socket(40, socket.SOCK_STREAM))
"""),
    # --- files of others
    "reading /etc": (("ok",), """
for p in ('/etc/passwd', '/etc/shadow', '/etc/hostname'): attempt(lambda: open(p).read(9))
"""),
    "reading home": (("ok",), """
for p in ('.ssh', '.bashrc', '.profile', '.cache'): attempt(lambda: os.stat(HOME + '/' + p) and open(HOME + '/' + p))
attempt(lambda: open(SECRET).read())
"""),
    "reading the repository": (("ok",), "attempt(lambda: open(REPOSITORY).read(9))"),
    "importing installed packages": (("ok",), """
attempt(lambda: __import__('openzaya.problems'))
attempt(lambda: __import__('torch'))
attempt(lambda: __import__('pip'))
"""),
    "reading /proc": (("ok",), """
for p in ('/proc/self/maps', '/proc/1/environ', f'/proc/{os.getppid()}/mem', '/sys/kernel/profiling'):
    attempt(lambda: open(p).read(9))
for p in ('/proc', '/sys'): attempt(lambda: os.listdir(p))
"""),
    "environment": (("ok",), "print('ESCAPED' if len(os.environ) else 'empty')"),
    "up through /proc/1/root": (("ok",), """
attempt(lambda: os.listdir('/proc/1/root/etc'))
attempt(lambda: open('/../../../../etc/passwd'))
attempt(lambda: os.chdir('/proc/1/cwd'))
"""),
    "symbolic links": (("ok",), """
attempt(lambda: (os.symlink('/etc/passwd', 'link'), open('link').read(9)))
attempt(lambda: (os.symlink(SECRET, 'link2'), open('link2').read(9)))
"""),
    "hard links": (("ok",), """
attempt(lambda: os.link(SECRET, 'link'))
attempt(lambda: os.link(os.__file__, 'link'))
"""),
    "deleting files": (("ok",), """
attempt(lambda: os.unlink(VICTIM))
attempt(lambda: os.unlink(os.__file__))
attempt(lambda: os.rename(os.__file__, '/tmp/os.py'))
"""),
    "overwriting the library": (("ok",), """
attempt(lambda: open(os.__file__, 'a'))
attempt(lambda: os.truncate(os.__file__, 0))
attempt(lambda: os.chmod(os.__file__, 0o777))
attempt(lambda: os.utime(os.__file__))
"""),
    "writing outside": (("ok",), """
for p in ('/x', '/usr/x', '/var/tmp/x', '/dev/shm/x', '/dev/x', '/run/x'): attempt(lambda: open(p, 'w'))
attempt(lambda: open(VICTIM, 'w'))
"""),
    "shared memory": (("ok",), """
from multiprocessing import shared_memory
attempt(lambda: shared_memory.SharedMemory('openzaya', True, 4096))
"""),
    "devices": (("ok",), """
for p in ('mem', 'kmsg', 'vda', 'sda', 'tty', 'kvm', 'fuse', 'ptmx'): attempt(lambda: os.open('/dev/' + p, os.O_RDONLY))
"""),
    "mknod": (("ok",), """
attempt(lambda: os.mknod('memory', 0o20600, os.makedev(1, 1)))
attempt(lambda: os.mkfifo('fifo'))
"""),
    "file handles": (("ok",), "attempt(lambda: syscall(304, -100, ctypes.create_string_buffer(64), 0))"),
    "chroot": (("ok",), """
attempt(lambda: os.chroot('.'))
attempt(lambda: syscall(155, b'.', b'.'))
"""),
    # --- other processes
    "killing the parent": (("ok",), """
for s in (9, 15, 2, 19):
  try: os.kill(os.getppid() or 1, s)
  except OSError: pass
"""),
    "killing everybody": (("ok", "killed"), """
try: os.kill(-1, signal.SIGKILL)
except OSError: pass
"""),
    "killing by number": (("ok", "killed"), """
for pid in range(2, 5000):
  if pid != os.getpid():
    try: os.kill(pid, 9)
    except OSError: pass
"""),
    "signals by a file's owner": (("ok",), """
import fcntl
r, w = os.pipe()
attempt(lambda: fcntl.fcntl(r, fcntl.F_SETOWN, os.getppid()))
"""),
    "ptrace": (("ok",), """
attempt(lambda: syscall(101, 16, os.getppid() or 1, 0, 0))
attempt(lambda: syscall(101, 0, 0, 0, 0))
"""),
    "memory of others": (("ok",), """
attempt(lambda: syscall(310, os.getppid() or 1, 0, 0, 0, 0, 0))
attempt(lambda: syscall(434, os.getppid() or 1, 0))
"""),
    "limits of others": (("ok",), """
import resource
attempt(lambda: resource.prlimit(os.getppid() or 1, resource.RLIMIT_CPU, (0, 0)))
attempt(lambda: os.sched_setaffinity(os.getppid() or 1, {0}))
attempt(lambda: os.setpriority(os.PRIO_PROCESS, os.getppid() or 1, 19))
"""),
    "children that stay": (("ok", "error"), """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in (1, 2, 15): signal.signal(number, signal.SIG_IGN)
        os.execv("/bin/sleep", ["sleep", "4242"]) if os.path.exists("/bin/sleep") else time.sleep(4242)
    os._exit(0)
"""),
    "children that flood": (("ok", "error", "output"), """
if os.fork() == 0:
    os.setsid()
    while True: os.write(1, b"x" * 65536)
"""),
    # --- more rights
    "setuid programs": (("ok",), """
for p in ('/bin/su', '/usr/bin/sudo', '/bin/mount', '/bin/sh', sys.executable): attempt(lambda: os.execv(p, [p]))
"""),
    "becoming root": (("ok",), """
attempt(lambda: os.setuid(0))
attempt(lambda: os.setgroups([0]))
attempt(lambda: os.setresuid(0, 0, 0))
print('ESCAPED' if 0 in (os.getuid(), os.geteuid(), os.getgid()) else '')
"""),
    "new namespaces": (("ok",), """
for f in (0x10000000, 0x20000, 0x20000000, 0x40000000):
  attempt(lambda: syscall(272, f))
  attempt(lambda: syscall(56, f | 17, 0, 0, 0, 0))
attempt(lambda: syscall(435, ctypes.create_string_buffer(88), 88))
attempt(lambda: syscall(308, 0, 0))
"""),
    "mount": (("ok",), """
attempt(lambda: syscall(165, b'none', b'/', b'tmpfs', 0, None))
attempt(lambda: syscall(166, b'/', 2))
attempt(lambda: syscall(430, b'tmpfs', 0))
attempt(lambda: syscall(428, -100, b'/', 1))
"""),
    "rare system calls": (("ok",), """
NUMBERS = (250, 248, 249, 298, 321, 425, 426, 427, 323, 103, 135, 169, 175, 246, 313, 320, 153, 167, 170, 172, 173, 237,
    279, 256, 240, 64, 68, 253, 300, 303, 304, 312, 311, 438, 424, 440, 447, 462)
for number in NUMBERS: attempt(lambda: syscall(number, 0, 0, 0, 0, 0))
"""),
    "terminal input": (("ok",), """
import fcntl, termios
attempt(lambda: fcntl.ioctl(0, termios.TIOCSTI, b'x'))
attempt(lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
"""),
    "clock": (("ok",), "attempt(lambda: time.clock_settime(time.CLOCK_REALTIME, 0))"),
    "priority": (("ok",), """
attempt(lambda: os.nice(-5))
attempt(lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)))
"""),
    "other numbering of calls": (("ok", "killed", "error"), "attempt(lambda: syscall(0x40000000 + 41, 2, 1, 0))"),
    "inspection allowed again": (("ok",), """
attempt(lambda: syscall(157, 4, 1, 0, 0, 0))
attempt(lambda: syscall(157, 1, 0, 0, 0, 0))
"""),
    # --- crashes and ends
    "segmentation fault": (("error",), "ctypes.string_at(0)"),
    "abort": (("error", "killed"), "os.abort()"),
    "endless recursion": (("error",), """
def f(): f()
f()
"""),
    "endless recursion in C": (("error", "memory", "ok", "timeout"), """
sys.setrecursionlimit(10 ** 9)
x = []
for _ in range(10 ** 6): x = [x]
repr(x)
"""),
    "deep source": (("error", "memory"), "eval('(' * 10 ** 6)"),
    "exit code": (("error",), "sys.exit(3)"),
    "exit with text": (("error",), "sys.exit('done')"),
    "killing itself": (("killed", "timeout", "error", "ok"), "os.kill(os.getpid(), signal.SIGKILL)"),
    "streams closed": (("ok",), "os.close(0); os.close(1); os.close(2)"),
    "all descriptors closed": (("ok", "error"), "os.closerange(0, 1000)"),
    "exit function that loops": (("timeout",), """
import atexit
atexit.register(lambda: [None for _ in iter(int, 1)])
"""),
    "error without text": (("error",), """
class E(Exception):
  def __str__(self): os._exit(0) if False else 1 / 0
raise E
"""),
    # --- lies
    "writing to every descriptor": (("ok", "error"), """
for descriptor in range(3, 1000):
    try:
        os.write(descriptor, b"V1")
        os.write(descriptor, (200).to_bytes(8, "big") + b"ok" * 100)
    except OSError: pass
"""),
    "looking for the supervisor's memory": (("ok",), """
import gc
for thing in gc.get_objects():
    if isinstance(thing, dict) and thing.get("stdin") == "later": print("ESCAPED")
for depth in range(1, 50):
    try: frame = sys._getframe(depth)
    except ValueError: break
    for value in frame.f_locals.values():
        if isinstance(value, int) and not isinstance(value, bool) and 3 < value < 1000:
            try: os.write(value, b"x"); print("ESCAPED")
            except OSError: pass
"""),
}  # fmt: skip
