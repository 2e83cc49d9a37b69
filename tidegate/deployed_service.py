"""A deployment file as the simulator sees it: instances in the order of their ids, service times and accuracies.

Emulated variants bring their law; the service times of others come from a profile that was measured on the machine.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.catalog import load_catalog
from models.profiles import Profile, modelled_profile, read_profiles
from policies.routing.contract import BATCH_SIZES, InstanceKind, RoutingError
from protocol.deployment import DeploymentFile

if TYPE_CHECKING:  # the simulator's packages are not needed to read a file
    from policies.routing.queueing_model import ServiceModel


def the_service(file: DeploymentFile, name: str = "") -> str:
    """The service meant: the named one, or the only one. Raises `RoutingError` that lists what there is."""
    if name in file.services or (not name and len(file.services) == 1):
        return name or next(iter(file.services))
    raise RoutingError(f"service = {name!r}: {file.name} has {', '.join(file.services)}; name one with --service")


def deployed_service(
    file: DeploymentFile, service: str = "", profiles: Path | None = None, without: Sequence[str] = ()
) -> "ServiceModel":
    """The service as deployed, less the instances `without` (ids). Raises `RoutingError` or `VariantError`."""
    name = the_service(file, service)
    spec = file.services[name]
    ids = file.desired_state().instance_ids(name)
    for one in without:
        if one not in ids:
            raise RoutingError(f"without = {one!r}: {file.name} has {', '.join(sorted(ids))}")
    variants = [ids[one] for one in sorted(ids) if one not in without]
    found = known_profiles(sorted(set(variants)), [Path(folder) for folder in file.catalog], profiles)
    capacity = {f"{worker.name}/{one.variant}": one.capacity for worker in file.workers for one in worker.instances}
    places = [capacity[one.partition("#")[0]] for one in sorted(ids) if one not in without]
    return service_model(
        [(found[variant], spec.variants.index(variant), held) for variant, held in zip(variants, places, strict=True)],
        spec.requirement_ms / 1e3,
        expire=spec.expire,
    )


def known_profiles(variants: Sequence[str], catalog: Sequence[Path], profiles: Path | None) -> dict[str, Profile]:
    """A profile per variant: from the file, else from the law of an emulated variant."""
    measured = {one.variant: one for one in read_profiles(profiles)} if profiles is not None else {}
    known = load_catalog(catalog)
    found = {}
    for variant in variants:
        if variant in measured:
            found[variant] = measured[variant]
        elif variant in known and known[variant].emulated is not None:
            found[variant] = modelled_profile(known[variant], BATCH_SIZES)
        else:
            raise RoutingError(
                f"no profile of {variant}: measure all that run together with tidegate models profile"
                f" {' '.join(variants)} -o profiles.json, and give --profile profiles.json"
            )
    return found


def service_model(
    instances: Sequence[tuple[Profile, int, int]], requirement_s: float, *, expire: bool = False
) -> "ServiceModel":
    """Instances (profile, rank, capacity) with their quantile grids; batch sizes never measured are modelled.

    Raises `RoutingError` for a variant without a known accuracy: routing weighs variants by it.
    """
    from policies.routing.queueing_model import ServiceModel

    kinds, grids = [], []
    for profile, rank, capacity in instances:
        accuracy = profile.accuracy.value
        if accuracy is None:
            raise RoutingError(f"profile of {profile.variant} has no accuracy: routing needs one to weigh variants")
        if not profile.times:
            raise RoutingError(f"profile of {profile.variant} has no samples: measure it again")
        largest = profile.times[-1].batch_size
        grid = np.stack([_grid_s(profile, size, largest) for size in BATCH_SIZES])
        # Rounded as profiles are: a law of 43 ms is 43 ms, and its policies' normalisers agree.
        mean_s = round(float(np.trapezoid(grid[0], dx=0.01)), 9)
        kinds.append(InstanceKind(profile.variant, rank, mean_s, float(accuracy), capacity))
        grids.append(grid)
    return ServiceModel(
        tuple(kinds), requirement_s=requirement_s, law="empirical", quantiles_s=np.stack(grids), expire=expire
    )


def _grid_s(profile: Profile, size: int, largest: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    """Quantiles for a batch size; beyond the largest measured one, scaled by 0.4 + 0.6 b (papers: modelled)."""
    if size <= largest:
        return profile.grid_s(size)
    return np.asarray(profile.grid_s(largest) * (0.4 + 0.6 * size) / (0.4 + 0.6 * largest))
