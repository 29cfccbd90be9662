import asyncio
import sys

from dbus_next import BusType, Variant
from dbus_next.aio import MessageBus


async def main(image: str) -> int:
    bus = await MessageBus(bus_type=BusType.SYSTEM).connect()

    async def proxy(path: str, interface: str):
        about = await bus.introspect("org.hostagent1", path)
        return bus.get_proxy_object("org.hostagent1", path, about).get_interface(interface)

    manager = await proxy("/org/hostagent1", "org.hostagent1.Manager")
    ended: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    # Before the job is started: so no end is missed, however quick it is.
    manager.on_job_removed(lambda id, path, target, result: ended.put_nowait((path, result)))

    job = await manager.call_start_job("pull", image, {"labels": Variant("a{ss}", {"by": "follow_pull"})})

    def changed(interface: str, values: dict[str, Variant], gone: list[str]) -> None:
        if "Progress" in values:
            print(f"{values['Progress'].value:.0%}", flush=True)

    properties = await proxy(job, "org.freedesktop.DBus.Properties")
    properties.on_properties_changed(changed)
    while True:
        path, result = await ended.get()
        if path == job:
            break
    said = await properties.call_get_all("org.hostagent1.Job")
    print(result, said["ErrorMessage"].value, said["Remedy"].value)
    return 0 if result == "completed" else 1


sys.exit(asyncio.run(main(sys.argv[1])))
