"""One [[endpoints]] table in, a `relay.model.Endpoint` with every default filled in out."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from relay import egress, formats
from relay.config.check import Report, has_type, read_table
from relay.config.lines import Place
from relay.config.settings import DeliverySettings, EndpointSettings
from relay.model import Endpoint, Secret, Signer, TlsFiles
from relay.signing import GenericForm, UnusableSecretError, scheme_of, together

# What decides about an endpoint's fate or about this machine's files is not for whoever may register one.
TLS_KEYS = ("tls_ca_file", "client_cert_file", "client_key_file")
CONFIG_ALONE = ("max_age", "down_after", "probe_interval", "probe_max", *TLS_KEYS, "proxy")


def read_endpoints(
    raw: Any, delivery: DeliverySettings, policy: egress.Policy, report: Report
) -> tuple[Endpoint, ...]:
    """Read all endpoints; those with a mistake are noted and left out."""
    at: Place = ("endpoints",)
    if not has_type(raw, list, "[[endpoints]] tables", at, report):
        return ()
    endpoints: list[Endpoint] = []
    seen: dict[str, int] = {}
    for index, table in enumerate(raw):
        place = (*at, index)
        if not has_type(table, dict, "a table", place, report):
            continue
        endpoint = _endpoint(table, place, delivery, policy, report)
        named = "id" in table and report.clean((*place, "id"))
        if named and (first := seen.setdefault(table["id"], index)) != index:
            report.wrong((*place, "id"), f"is the id of endpoints[{first}] already")
            continue
        if endpoint is not None:
            endpoints.append(endpoint)
    return tuple(endpoints)


def read_api_endpoint(
    settings: Mapping[str, Any], delivery: DeliverySettings, policy: egress.Policy
) -> Endpoint:
    """Read the settings of an endpoint of the API by the same rules. Raises SettingsError."""
    report = Report()
    for name in settings.keys() & CONFIG_ALONE:
        report.wrong((name,), "is set in the config alone")
    # Nor are they looked at: whether a file is there is not to be found out this way.
    settings = {name: value for name, value in settings.items() if name not in CONFIG_ALONE}
    endpoint = _endpoint(settings, (), delivery, policy, report)
    if endpoint is not None and "secrets" in settings:
        # The newest remains alone when a rotation's overlap ends, and has to do for every scheme then.
        _endpoint({**settings, "secrets": settings["secrets"][:1]}, (), delivery, policy, report)
    if endpoint is not None and egress.refuses_literal(
        endpoint.url, policy.opened_to("api", plain=endpoint.url.lower().startswith("http:"))
    ):
        report.wrong(("url",), "holds an address that deliveries may not go to")
    if endpoint is None or report.found:
        raise SettingsError(tuple((_pointer(place), text) for place, text in report.found))
    return replace(endpoint, source="api")


class SettingsError(Exception):
    """An endpoint's settings with mistakes: of each its JSON pointer and what is wrong."""

    def __init__(self, problems: tuple[tuple[str, str], ...]) -> None:
        super().__init__("; ".join(f"{pointer} {text}" for pointer, text in problems))
        self.problems = problems


def _pointer(place: Place) -> str:
    return "#" + "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in place)


def _endpoint(
    table: Mapping[str, Any], at: Place, delivery: DeliverySettings, policy: egress.Policy, report: Report
) -> Endpoint | None:
    own, changes = read_table(table, at, report, EndpointSettings, DeliverySettings)
    how = replace(delivery, **changes)
    # Whether http is meant to be allowed cannot be known while that is itself a mistake.
    if "url" in own and report.clean(("egress", "allow_http")):
        problem = egress.check_url(own["url"], policy)
        if problem is not None:
            report.wrong((*at, "url"), problem)
    _check_headers(how, at, report)
    _check_patience(table, how, at, report)
    sign = _signers(table, own, how, at, report)
    tls = read_tls(how, table, at, report) if table.keys() & set(TLS_KEYS) else how.tls
    if not report.clean(at):
        return None
    return Endpoint(
        id=own["id"],
        url=own["url"],
        events=own["events"],
        description=own.get("description", ""),
        sign=sign,
        signatures=how.signatures,
        retry_schedule=how.retry_schedule,
        timeout_seconds=how.timeout_seconds,
        concurrency=how.concurrency,
        rate=how.rate,
        order=how.order,
        max_age_seconds=how.max_age_seconds,
        down_after=how.down_after,
        probe_interval_seconds=how.probe_interval_seconds,
        probe_max_seconds=how.probe_max_seconds,
        format=formats.fixed(how.format, how.source),
        headers=how.headers,
        tls=tls,
        proxy=how.proxy,
    )


def _signers(
    table: Mapping[str, Any], own: Mapping[str, Any], how: DeliverySettings, at: Place, report: Report
) -> tuple[Signer, ...]:
    """Prepare each scheme with the endpoint's secrets, newest first."""
    if "secret" in table and "secrets" in table:
        report.wrong((*at, "secrets"), "stands beside secret; give one of them")
        return ()
    if "secret" not in table and "secrets" not in table:
        report.wrong((*at, "secret"), "is missing")
        return ()
    name = "secret" if "secret" in table else "secrets"
    # A mistake in the schemes or the secrets has been told; what would follow from it has not to be.
    if not report.clean((*at, name), (*at, "signatures"), ("delivery", "signatures")):
        return ()
    secrets: tuple[Secret, ...] = own["secrets"] if name == "secrets" else (own["secret"],)
    signers: list[Signer] = []
    # The standard has an asymmetric signature follow the symmetric ones.
    for signature in sorted(how.signatures, key=lambda signature: signature == "standard-ed25519"):
        try:
            signers.append(scheme_of(signature)(secrets))
        except UnusableSecretError as error:
            report.wrong((*at, name), f"cannot sign as {signature}: {error}")
    return (together(signers),)


def read_tls(how: DeliverySettings, table: Mapping[str, Any], at: Place, report: Report) -> TlsFiles | None:
    """Look at the files for TLS that a table names; what is wrong is noted at the key that is to blame."""
    from relay.tls import TlsFilesError, read_files

    if not report.clean(*((*at, name) for name in TLS_KEYS), *(("delivery", name) for name in TLS_KEYS)):
        return None
    try:
        return read_files(how.tls_ca_file, how.client_cert_file, how.client_key_file)
    except TlsFilesError as error:
        place = _set_at(table, at, error.key, *TLS_KEYS)
        report.wrong(place, str(error) if place[-1] == error.key else f"{error.key} {error}")
        return None


def _check_patience(table: Mapping[str, Any], how: DeliverySettings, at: Place, report: Report) -> None:
    """Note waits that cannot be meant, once and where they stand."""
    schedule_seconds = sum(how.retry_schedule)
    if schedule_seconds > how.max_age_seconds:
        place = _set_at(table, at, "max_age", "retry_schedule")
        if report.clean(place):
            report.wrong(
                place,
                f"retry_schedule takes {schedule_seconds:g} s in all, longer than max_age, "
                f"{how.max_age_seconds:g} s",
            )
    if how.probe_max_seconds < how.probe_interval_seconds:
        place = _set_at(table, at, "probe_max", "probe_interval")
        if report.clean(place):
            report.wrong(place, "probe_max is shorter than probe_interval")


def _set_at(table: Mapping[str, Any], at: Place, *names: str) -> Place:
    """Return the place of the first of these keys that the table sets; else it is [delivery]'s doing."""
    return next(((*at, name) for name in names if name in table), ("delivery", names[0]))


def _check_headers(how: DeliverySettings, at: Place, report: Report) -> None:
    """Note every header that would be there twice: it would be left to the receiver which one counts."""
    names = [name.lower() for name, _ in how.headers]
    names += [each.header.lower() for each in how.signatures if isinstance(each, GenericForm)]
    for name in sorted({name for name in names if names.count(name) > 1}):
        report.wrong((*at, "signatures"), f"with these and its headers it would set {name} twice")
