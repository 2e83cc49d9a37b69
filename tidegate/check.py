"""What a deployment file names has to exist: routers in the gateway, variants in the catalog."""

from pathlib import Path

from gateway.router import ROUTERS
from models.catalog import VariantError, load_catalog
from protocol.deployment import DeploymentError, DeploymentFile, did_you_mean


def refuse_unknown(file: DeploymentFile) -> None:
    """Asked before anything starts. Raises `DeploymentError`: the key, its value, and what there is."""
    for name, spec in file.services.items():
        if spec.router not in ROUTERS:
            raise DeploymentError(
                f"services.{name}.router = {spec.router!r}: must be one of {', '.join(ROUTERS)}"
                f"{did_you_mean(spec.router, ROUTERS)}"
            )
    try:
        known = load_catalog(tuple(Path(folder) for folder in file.catalog))
    except VariantError as error:
        raise DeploymentError(str(error)) from error
    for name, spec in file.services.items():
        for variant in spec.variants:
            if variant not in known:
                raise DeploymentError(
                    f"services.{name}.variants: {variant!r} is not in the catalog: it has {', '.join(sorted(known))};"
                    " others need a TOML entry in a folder of catalog = [...]" + did_you_mean(variant, known)
                )
