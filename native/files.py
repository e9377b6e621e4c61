"""How many files a process may have open."""

import resource


def room_for(files: int) -> int:
    """Let this process have so many files open, connections included; how many it then may.

    Systems begin with a soft limit, often of 1,024, which a process may raise up to a hard one.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = files if hard == resource.RLIM_INFINITY else min(files, hard)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return most
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most
