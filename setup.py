"""Map the checkout's folders to packages, and bundle what the partition page draws with.

Everything else about the project stands in pyproject.toml.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

FOLDERS = {"graphlocal": "graphlocal", "graphlocal.passes": "passes", "graphlocal.targets": "targets"}
PAGE = Path(__file__).resolve().parent / "targets" / "page"


class BuildWithPage(build_py):
    """Fetch and bundle the page's libraries, as the lock pins them, where they are not there yet and npm is."""

    def run(self):
        if not (PAGE / "vendor").is_dir():
            reason = self.bundle()
            if reason:
                print(f"graphlocal is built without the partition page: {reason}", file=sys.stderr)
        super().run()

    @staticmethod
    def bundle():
        """Returns why it did not work, or None."""
        npm = shutil.which("npm")
        if npm is None:
            return "npm is missing (install Node.js, and build again)"
        for step in (["ci", "--omit=dev", "--ignore-scripts", "--no-audit", "--no-fund"], ["run", "bundle"]):
            done = subprocess.run([npm, *step], cwd=PAGE, capture_output=True, text=True)
            if done.returncode:
                return f"npm {step[0]} failed: {(done.stderr or done.stdout).strip()[-500:]}"
        return None


setup(
    cmdclass={"build_py": BuildWithPage},
    package_dir=FOLDERS,
    packages=[
        name
        for package, folder in FOLDERS.items()
        for name in [package, *(f"{package}.{found}" for found in find_packages(folder))]
    ],
)
