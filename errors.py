"""What a user got wrong, said in one line."""

import contextlib
import errno


def one_line(text):
    r"""text with what is no printable character escaped, such as \n, or \udcff of a file's name.

    Names of files may hold line breaks, terminals' control codes, bytes that are no UTF-8.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in str(text)
    )


class UserError(ValueError):
    """One line with the value, the rule and the remedy, whatever the names in it hold.

    Entry points print it and end with status 2 (`endings.run_command`).
    """

    def __init__(self, message=""):
        super().__init__(one_line(message))


class MissingFiles(UserError):
    """The files of a data set are not there, while nothing else is wrong."""


def reason_of(error):
    """The first line of what an exception says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# A disk of the network, or one in user space (FUSE), that has gone.
UNREACHABLE = {
    errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ECONNABORTED,
}  # fmt: skip

_REMEDIES = {
    "make room": (errno.ENOSPC, errno.EDQUOT),
    "raise the limit on the size of a file (ulimit -f)": (errno.EFBIG,),
    "change its permissions": (errno.EACCES, errno.EPERM),
    "mount it so that it can be written": (errno.EROFS,),
    "move away what stands there": (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY),
    "shorten it": (errno.ENAMETOOLONG,),
    "allow more open files (ulimit -n)": (errno.EMFILE, errno.ENFILE),
    "look after the disk": (errno.EIO, *UNREACHABLE),
}


def remedy_of(error):
    """What helps where an OSError kept something from being written: its errno decides."""
    return next(
        (words for words, codes in _REMEDIES.items() if error.errno in codes), "put that right"
    )


@contextlib.contextmanager
def needing(package, what, otherwise=""):
    """In the body a package is imported for `what`; however that fails, it is a UserError.

    A package that is there may be of another NumPy or Python than this one: it raises nearly
    anything.
    """
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{what} needs the package {package} ({reason_of(error)}): pip install {package}"
            f"{otherwise}"
        ) from None
