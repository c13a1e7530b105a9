"""Builds in advance what some suites otherwise build when they start: `python tests/support/build_tools.py`.

These are the programs of `make test-kubernetes` and `make test-autoscaling`, and the environment of
`make test-tensorrt`. A suite that needs one of them in the meantime waits for it.
"""

from __future__ import annotations

from bindings_environment import bindings
from deploy_tools import control_plane, custom_definitions, etcd, keda, kustomize, prometheus


def main() -> None:
    """Build in the order of use."""
    for build in (kustomize, bindings, etcd, prometheus, control_plane, custom_definitions, keda):
        build()


if __name__ == "__main__":
    main()
