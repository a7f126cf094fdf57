"""Checks custom resources strictly; run by the Python of the validators' own environment: validate_crds.py FILE.

Prints "ok KIND NAME" or what is wrong, one line an object; exit code 1 when something is.
"""

import sys

import yaml
from cloudcoil.models.keda import v1alpha1 as keda
from cloudcoil.models.prometheus_operator import v1 as operator

MODELS = {
    ("keda.sh/v1alpha1", "ScaledObject"): keda.ScaledObject,
    ("monitoring.coreos.com/v1", "PodMonitor"): operator.PodMonitor,
    ("monitoring.coreos.com/v1", "PrometheusRule"): operator.PrometheusRule,
}


def main() -> int:
    """Every object of the file must be of a kind that is known here."""
    wrong = 0
    with open(sys.argv[1], encoding="utf-8") as file:
        for document in yaml.safe_load_all(file):
            name = f"{document['kind']} {document['metadata']['name']}"
            try:
                MODELS[document["apiVersion"], document["kind"]].model_validate(document, strict=False, extra="forbid")
                print("ok", name)
            except Exception as exc:
                wrong += 1
                print("BAD", name, str(exc).replace("\n", " ")[:500])
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
