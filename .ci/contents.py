"""Checks what was built, and prints the oldest versions that the wheel allows, as constraints.

python .ci/contents.py dist >oldest.txt
"""

import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

dist = Path(sys.argv[1])
[sdist], [wheel] = dist.glob("jaxflow-*.tar.gz"), dist.glob("jaxflow-*.whl")

with tarfile.open(sdist) as archive:
    packed = {name.partition("/")[2] for name in archive.getnames()}
with zipfile.ZipFile(wheel) as archive:
    installed = {name for name in archive.namelist() if ".dist-info/" not in name}
    [about] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(archive.read(about).decode())

tracked = set(subprocess.check_output(["git", "ls-files"], text=True).splitlines())
unknown = {name for name in packed - tracked if name and Path(name).is_file()}
assert not unknown, f"the sdist holds what git does not: {sorted(unknown)}"
shipped = ("jaxflow/", "tests/", "benchmarks/", "examples/", "docs/", "notebooks/")
missing = {name for name in tracked if name.startswith(shipped)} - packed
assert not missing, f"the sdist lacks {sorted(missing)}"
assert installed == {name for name in tracked if name.startswith("jaxflow/")}, "the wheel differs"

for requirement in metadata.get_all("Requires-Dist", []):
    if "extra ==" not in requirement:
        print(re.sub(r"\s*>=\s*", "==", requirement))
