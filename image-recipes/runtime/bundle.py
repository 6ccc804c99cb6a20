"""Write the modules that the agent's boot imports into one file; run by the runtime's own Python.

bundle.py LIBRARY PLACE OUTPUT: LIBRARY is the folder with the package, PLACE where it lies in the
guest.  The file is a marshalled {name: (folder of a package or None, code)}.
"""

import marshal
import os
import sys


def bundle(library, place):
    sys.path.insert(0, library)
    import apppot.guest.init.main  # noqa: F401

    modules = {}
    for name in sorted(name for name in sys.modules if name.split(".")[0] == "apppot"):
        path = name.replace(".", "/")
        if os.path.isfile(f"{library}/{path}.py"):
            modules[name] = (None, _code(library, place, f"{path}.py"))
        elif os.path.isfile(f"{library}/{path}/__init__.py"):
            modules[name] = (f"{place}/{path}", _code(library, place, f"{path}/__init__.py"))
        else:  # the namespace above the package
            modules[name] = (f"{place}/{path}", compile("", f"{place}/{path}", "exec"))
    return modules


def _code(library, place, path):
    with open(f"{library}/{path}", encoding="utf-8") as source:
        return compile(source.read(), f"{place}/{path}", "exec", dont_inherit=True)


if __name__ == "__main__":
    # Version 2 of the format has no references, which depend on what else is in memory.
    data = marshal.dumps(bundle(sys.argv[1], sys.argv[2]), 2)
    with open(sys.argv[3], "wb") as output:
        output.write(data)
