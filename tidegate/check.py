"""What a deployment file names has to exist: routers, variants in the catalogs, and the parts of an edge network."""

from pathlib import Path

from gateway.router import ROUTERS
from models.catalog import VariantError, load_catalog
from models.edge_catalog import EdgeVariant, load_edge_catalog
from policies.placement.deployed import network_of, policy_fault
from policies.placement.edge_network import EdgeNetwork
from protocol.deployment import DeploymentError, DeploymentFile, did_you_mean, few_of
from protocol.edge_records import EdgeSpec


def refuse_unknown(file: DeploymentFile) -> None:
    """Asked before anything starts. Raises `DeploymentError`: the key, its value, and what there is."""
    for name, spec in file.services.items():
        if spec.router not in ROUTERS:
            raise DeploymentError(
                f"services.{name}.router = {spec.router!r}: must be one of {', '.join(ROUTERS)}"
                f"{did_you_mean(spec.router, ROUTERS)}"
            )
    folders = tuple(Path(folder) for folder in file.catalog)
    try:
        known = load_catalog(folders)
        edge_known = load_edge_catalog(folders) if file.edge is not None else {}
    except VariantError as error:
        raise DeploymentError(str(error)) from error
    for name, spec in file.services.items():
        for variant in spec.variants:
            if variant not in known:
                raise DeploymentError(
                    f"services.{name}.variants: {variant!r} is not in the catalog: it has {', '.join(sorted(known))};"
                    " others need a TOML entry in a folder of catalog = [...]" + did_you_mean(variant, known)
                )
    if file.edge is not None:
        _refuse_unknown_edge(file, file.edge, edge_known)


def _refuse_unknown_edge(file: DeploymentFile, edge: EdgeSpec, catalog: dict[str, EdgeVariant]) -> None:
    """Graph, tables, nodes, policy, and that every variant of a table has a network that can be opened."""
    try:
        network = network_of(edge)
    except ValueError as error:
        raise DeploymentError(str(error)) from error
    if fault := policy_fault(edge):
        raise DeploymentError(fault)
    for worker in file.workers:
        if worker.node and worker.node not in network.graph.names:
            shown = ", ".join(few_of(network.graph.names, 20))
            meant = did_you_mean(worker.node, network.graph.names)
            raise DeploymentError(f"workers {worker.name!r}: node = {worker.node!r}: the graph has {shown}{meant}")
    _refuse_unknown_variants(file, network, catalog)


def _refuse_unknown_variants(file: DeploymentFile, network: EdgeNetwork, catalog: dict[str, EdgeVariant]) -> None:
    named = {one.table_name or one.name: one for one in catalog.values()} | catalog
    for table in network.tables:
        for variant in table.variants:
            where = f"edge.services.{table.name}: the table's variant {variant!r}"
            entry = named.get(variant)
            if entry is None:
                known = ", ".join(sorted(catalog)) or "none"
                raise DeploymentError(f"{where} is not in the catalog, which has {known}; add catalog = [FOLDER]")
            if not entry.path:
                remedy = f"`tidegate models export {entry.name} -o FOLDER` and catalog = [FOLDER]"
                raise DeploymentError(f"{where} ({entry.name}) has no network file: {remedy}")
    in_tables = {variant for table in network.tables for variant in table.variants}
    for worker in file.workers:
        for variant in worker.preload:
            if variant not in in_tables:
                shown, meant = ", ".join(sorted(in_tables)), did_you_mean(variant, in_tables)
                raise DeploymentError(f"workers {worker.name!r}: preload {variant!r}: the tables have {shown}{meant}")
