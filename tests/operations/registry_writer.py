"""A writer that is killed, for test_registry_stress.py: adds, moves an alias, and prints what is done, without end."""

import sys

from qrlora.operations.registry import Registry

if __name__ == "__main__":
    registry, run = Registry.open(sys.argv[1], actor="writer"), sys.argv[2]
    for number in range(10**6):
        one = registry.add(f"{run} {number} ".encode() * 2000, "report", name=f"run-{run}")
        registry.set_alias(f"run-{run}", "newest", one.digest)
        print(one.digest, flush=True)
