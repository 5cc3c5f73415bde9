package ocispec

import (
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

func ptr[T any](v T) *T { return &v }

// Every row makes one thing of a good configuration bad; the message is exact,
// because a person has nothing else.
func TestBadInput(t *testing.T) {
	for _, tc := range []struct {
		name string
		edit func(s *specs.Spec, o *Options)
		want string
	}{
		{"version missing", func(s *specs.Spec, _ *Options) { s.Version = "" }, `ociVersion: is missing, want 1.0.0 to 1.3.x`},
		{"version 2", func(s *specs.Spec, _ *Options) { s.Version = "2.0.0" }, `ociVersion: "2.0.0" is not supported, want 1.0.0 to 1.3.x`},
		{"version 0", func(s *specs.Spec, _ *Options) { s.Version = "0.9.1" }, `ociVersion: "0.9.1" is not supported, want 1.0.0 to 1.3.x`},
		{"version 1.4", func(s *specs.Spec, _ *Options) { s.Version = "1.4.0" }, `ociVersion: "1.4.0" is not supported, want 1.0.0 to 1.3.x`},
		{"version garbage", func(s *specs.Spec, _ *Options) { s.Version = "latest" }, `ociVersion: "latest" is not a version, want 1.0.0 to 1.3.x`},
		{"version short", func(s *specs.Spec, _ *Options) { s.Version = "1.0" }, `ociVersion: "1.0" is not a version, want 1.0.0 to 1.3.x`},
		{"version tail", func(s *specs.Spec, _ *Options) { s.Version = "1.0.2-" }, `ociVersion: "1.0.2-" is not a version, want 1.0.0 to 1.3.x`},
		{"version signs", func(s *specs.Spec, _ *Options) { s.Version = "1.+1.0" }, `ociVersion: "1.+1.0" is not a version, want 1.0.0 to 1.3.x`},

		{"root missing", func(s *specs.Spec, _ *Options) { s.Root = nil }, `root: is missing, want an object with the path of the root file system`},
		{"root path missing", func(s *specs.Spec, _ *Options) { s.Root.Path = "" }, `root.path: is missing, want the directory of the root file system`},
		{"root path NUL", func(s *specs.Spec, _ *Options) { s.Root.Path = "a\x00" }, `root.path: holds a NUL byte`},
		{"vm", func(s *specs.Spec, _ *Options) { s.VM = &specs.VM{} }, `vm: is not supported: hypervisor, kernel and image come from runv's own configuration, not from a bundle`},

		{"process missing", func(s *specs.Spec, _ *Options) { s.Process = nil }, `process: is missing, want the program to run`},
		{"args empty", func(s *specs.Spec, _ *Options) { s.Process.Args = nil }, `process.args: is empty, want the program to run and its arguments`},
		{"args NUL", func(s *specs.Spec, _ *Options) { s.Process.Args = []string{"a", "b\x00"} }, `process.args[1]: holds a NUL byte`},
		{"cwd missing", func(s *specs.Spec, _ *Options) { s.Process.Cwd = "" }, `process.cwd: is missing, want an absolute path in the container`},
		{"cwd relative", func(s *specs.Spec, _ *Options) { s.Process.Cwd = "tmp" }, `process.cwd: "tmp" is not absolute`},
		{"env", func(s *specs.Spec, _ *Options) { s.Process.Env = []string{"A=1", "B"} }, `process.env[1]: "B" has no '=', want NAME=value`},
		{"env name", func(s *specs.Spec, _ *Options) { s.Process.Env = []string{"=1"} }, `process.env[0]: "=1" has no name, want NAME=value`},
		{"console", func(s *specs.Spec, _ *Options) { s.Process.ConsoleSize = &specs.Box{Height: 70000} }, `process.consoleSize: 70000 by 0 is too large, want at most 65535 each`},
		{"uid", func(s *specs.Spec, _ *Options) { s.Process.User.UID = 1<<32 - 1 }, `process.user.uid: 4294967295 is not a user id`},
		{"group", func(s *specs.Spec, _ *Options) { s.Process.User.AdditionalGids = []uint32{1<<32 - 1} }, `process.user.additionalGids[0]: 4294967295 is not a group id`},
		{"umask", func(s *specs.Spec, _ *Options) { s.Process.User.Umask = ptr(uint32(0o1000)) }, `process.user.umask: is 01000, want at most 0777`},
		{"oom", func(s *specs.Spec, _ *Options) { s.Process.OOMScoreAdj = ptr(1001) }, `process.oomScoreAdj: is 1001, want -1000 to 1000`},
		{"capability", func(s *specs.Spec, _ *Options) {
			s.Process.Capabilities.Bounding = append(s.Process.Capabilities.Bounding, "CAP_TEST")
		}, `process.capabilities.bounding[3]: "CAP_TEST" is not a capability, want a name such as CAP_KILL`},
		{"capability in lower case", func(s *specs.Spec, _ *Options) { s.Process.Capabilities.Ambient = []string{"kill"} }, `process.capabilities.ambient[0]: "kill" is not a capability, want a name such as CAP_KILL`},
		{"effective and not permitted", func(s *specs.Spec, _ *Options) { s.Process.Capabilities.Permitted = []string{"CAP_KILL"} }, `process.capabilities.effective: CAP_NET_BIND_SERVICE is not in process.capabilities.permitted`},
		{"rlimit", func(s *specs.Spec, _ *Options) { s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_TEST"}} }, `process.rlimits[0].type: "RLIMIT_TEST" is not a resource limit, want a name such as RLIMIT_NOFILE`},
		{"rlimit twice", func(s *specs.Spec, _ *Options) {
			s.Process.Rlimits = append(s.Process.Rlimits, s.Process.Rlimits[0])
		}, `process.rlimits[1].type: RLIMIT_NOFILE is given twice`},
		{"rlimit soft", func(s *specs.Spec, _ *Options) { s.Process.Rlimits[0].Soft = 2000 }, `process.rlimits[0].soft: RLIMIT_NOFILE is 2000, above its hard limit of 1024`},
		{"io class", func(s *specs.Spec, _ *Options) { s.Process.IOPriority = &specs.LinuxIOPriority{Class: "x"} }, `process.ioPriority.class: is "x", want IOPRIO_CLASS_RT, IOPRIO_CLASS_BE or IOPRIO_CLASS_IDLE`},
		{"io priority", func(s *specs.Spec, _ *Options) {
			s.Process.IOPriority = &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_BE, Priority: 8}
		}, `process.ioPriority.priority: is 8, want 0 to 7`},
		{"scheduler", func(s *specs.Spec, _ *Options) { s.Process.Scheduler = &specs.Scheduler{} }, `process.scheduler.policy: is missing, want a name such as SCHED_OTHER`},
		{"scheduler policy", func(s *specs.Spec, _ *Options) { s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedISO} }, `process.scheduler.policy: "SCHED_ISO" is not a policy of Linux, want a name such as SCHED_OTHER`},
		{"scheduler nice", func(s *specs.Spec, _ *Options) {
			s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedOther, Nice: 20}
		}, `process.scheduler.nice: is 20, want -20 to 19`},
		{"scheduler priority", func(s *specs.Spec, _ *Options) { s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedFIFO} }, `process.scheduler.priority: is 0, want 1 to 99`},
		{"scheduler priority of others", func(s *specs.Spec, _ *Options) {
			s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedBatch, Priority: 1}
		}, `process.scheduler.priority: is for SCHED_FIFO and SCHED_RR, and the policy is SCHED_BATCH`},
		{"scheduler deadline", func(s *specs.Spec, _ *Options) {
			s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedOther, Period: 1}
		}, `process.scheduler: runtime, deadline and period are for SCHED_DEADLINE, and the policy is SCHED_OTHER`},
		{"scheduler flag", func(s *specs.Spec, _ *Options) {
			s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedOther, Flags: []specs.LinuxSchedulerFlag{"f"}}
		}, `process.scheduler.flags[0]: "f" is not a scheduler flag`},
		{"affinity", func(s *specs.Spec, _ *Options) { s.Process.ExecCPUAffinity = &specs.CPUAffinity{Final: "x"} }, `process.execCPUAffinity.final: "x" is not a list of numbers and ranges such as 0-2,7`},

		{"hostname", func(s *specs.Spec, _ *Options) { s.Hostname = strings.Repeat("h", 65) }, `hostname: has 65 bytes, want at most 64`},
		{"hostname without uts", func(s *specs.Spec, _ *Options) { dropNamespace(s, specs.UTSNamespace) }, `hostname: cannot be set without a uts namespace in linux.namespaces`},
		{"domainname without uts", func(s *specs.Spec, _ *Options) {
			s.Hostname, s.Domainname = "", "d"
			dropNamespace(s, specs.UTSNamespace)
		}, `domainname: cannot be set without a uts namespace in linux.namespaces`},

		{"mount destination", func(s *specs.Spec, _ *Options) { s.Mounts[1].Destination = "" }, `mounts[1].destination: is missing, want an absolute path in the container`},
		{"mount type", func(s *specs.Spec, _ *Options) { s.Mounts[1].Type = "" }, `mounts[1].type: is missing, want a file system type, or "bind" among the options`},
		{"mount type of the host", func(s *specs.Spec, _ *Options) { s.Mounts[1].Type = "nfs" }, `mounts[1].type: "nfs" would need a device or a directory of the host below it, want a bind mount, tmpfs, proc, sysfs, devpts, mqueue, cgroup, or ext4, erofs, squashfs on a block device or image`},
		{"bind without source", func(s *specs.Spec, _ *Options) {
			s.Mounts[1] = specs.Mount{Destination: "/x", Type: "bind"}
		}, `mounts[1].source: is missing, want the file or directory to bind`},
		{"tmpcopyup", func(s *specs.Spec, _ *Options) { s.Mounts[0].Options = []string{"tmpcopyup"} }, `mounts[0].options: tmpcopyup is for a tmpfs, and this is "proc"`},
		{"remount", func(s *specs.Spec, _ *Options) { s.Mounts[0].Options = []string{"ro", "remount"} }, `mounts[0].options[1]: remount is supported for bind mounts only`},
		{"idmap", func(s *specs.Spec, _ *Options) {
			s.Mounts[1] = specs.Mount{Destination: "/x", Source: "/y", Options: []string{"bind", "idmap"}}
		}, `mounts[1].options[1]: id-mapped mounts are not supported: the file share between host and VM cannot map ids`},
		{"mount mapping", func(s *specs.Spec, _ *Options) { s.Mounts[1].UIDMappings = []specs.LinuxIDMapping{{Size: 1}} }, `mounts[1].uidMappings: id-mapped mounts are not supported: the file share between host and VM cannot map ids`},
		{"mount NUL", func(s *specs.Spec, _ *Options) { s.Mounts[1].Options = []string{"a\x00"} }, `mounts[1].options[0]: holds a NUL byte`},

		{"hook relative", func(s *specs.Spec, _ *Options) {
			s.Hooks = &specs.Hooks{Poststop: []specs.Hook{{Path: "/a"}, {Path: "b"}}}
		}, `hooks.poststop[1].path: "b" is not absolute`},
		{"hook path", func(s *specs.Spec, _ *Options) { s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{}}} }, `hooks.createRuntime[0].path: is missing, want an absolute path`},
		{"hook timeout", func(s *specs.Spec, _ *Options) {
			s.Hooks = &specs.Hooks{StartContainer: []specs.Hook{{Path: "/a", Timeout: ptr(-1)}}}
		}, `hooks.startContainer[0].timeout: is -1, want more than 0 seconds`},
		{"hook env", func(s *specs.Spec, _ *Options) {
			s.Hooks = &specs.Hooks{CreateContainer: []specs.Hook{{Path: "/a", Env: []string{"x"}}}}
		}, `hooks.createContainer[0].env[0]: is "x", want NAME=value`},

		{"annotation key", func(s *specs.Spec, _ *Options) { s.Annotations = map[string]string{"": "x"} }, `annotations: a key is empty, want a name`},
		{"annotation unknown", func(s *specs.Spec, _ *Options) { s.Annotations = map[string]string{"io.runv.kernel_params": "x"} }, `annotations["io.runv.kernel_params"]: is not one of runv's, want io.runv.vcpus, io.runv.memory, io.runv.network, io.runv.rootfs-type or io.runv.overlay`},
		{"annotation vcpus", func(s *specs.Spec, _ *Options) { s.Annotations = map[string]string{"io.runv.vcpus": "0"} }, `annotations["io.runv.vcpus"]: is "0", want a number of processors, 1 to 1024`},
		{"annotation memory", func(s *specs.Spec, _ *Options) { s.Annotations = map[string]string{"io.runv.memory": "63"} }, `annotations["io.runv.memory"]: is "63", want MiB, or a number with MiB or GiB, of at least 64 MiB`},
		{"annotation network", func(s *specs.Spec, _ *Options) { s.Annotations = map[string]string{"io.runv.network": "host"} }, `annotations["io.runv.network"]: is "host", want "namespace", "none" or "user"`},

		{"namespace type", func(s *specs.Spec, _ *Options) { s.Linux.Namespaces[0].Type = "disk" }, `linux.namespaces[0].type: "disk" is not a namespace, want pid, network, mount, ipc, uts, user, cgroup or time`},
		{"namespace twice", func(s *specs.Spec, _ *Options) { s.Linux.Namespaces[1].Type = specs.PIDNamespace }, `linux.namespaces[1].type: pid is given twice`},
		{"namespace path relative", func(s *specs.Spec, _ *Options) { s.Linux.Namespaces[0].Path = "ns" }, `linux.namespaces[0].path: "ns" is not absolute`},
		{"host networking", func(s *specs.Spec, _ *Options) { dropNamespace(s, specs.NetworkNamespace) }, `linux.namespaces: host networking cannot exist in a VM: list a network namespace, or ask for user-mode networking with --network=user or the annotation io.runv.network=user`},
		{"pid path", func(s *specs.Spec, _ *Options) { s.Linux.Namespaces[0].Path = "/proc/1/ns/pid" }, `linux.namespaces[0].path: "/proc/1/ns/pid" is a pid namespace of the host, or of another runtime's container: a container in a VM can join those of its own pod only`},
		{"ipc path", func(s *specs.Spec, _ *Options) { s.Linux.Namespaces[2].Path = "/proc/1/ns/ipc" }, `linux.namespaces[2].path: "/proc/1/ns/ipc" is an ipc namespace of the host, or of another runtime's container: a container in a VM can join those of its own pod only`},
		{"mount path", func(s *specs.Spec, _ *Options) { s.Linux.Namespaces[4].Path = "/proc/1/ns/mnt" }, `linux.namespaces[4].path: a container has a mount namespace of its own and cannot join "/proc/1/ns/mnt"`},
		{"user path", func(s *specs.Spec, _ *Options) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace, Path: "/proc/1/ns/user"})
		}, `linux.namespaces[6].path: "/proc/1/ns/user" is a user namespace of the host, or of another runtime's container: a container in a VM can join those of its own pod only`},
		{"masked without mount", func(s *specs.Spec, _ *Options) { dropNamespace(s, specs.MountNamespace) }, `linux.maskedPaths: cannot be masked without a mount namespace in linux.namespaces`},
		{"masked relative", func(s *specs.Spec, _ *Options) { s.Linux.MaskedPaths[0] = "proc" }, `linux.maskedPaths[0]: "proc" is not an absolute path`},
		{"readonly relative", func(s *specs.Spec, _ *Options) { s.Linux.ReadonlyPaths[1] = "" }, `linux.readonlyPaths[1]: "" is not an absolute path`},
		{"propagation", func(s *specs.Spec, _ *Options) { s.Linux.RootfsPropagation = "some" }, `linux.rootfsPropagation: is "some", want shared, slave, private or unbindable, with or without a leading r`},
		{"propagation without pivot", func(s *specs.Spec, o *Options) { s.Linux.RootfsPropagation, o.NoPivot = "rprivate", true }, `linux.rootfsPropagation: "rprivate" is not safe with --no-pivot`},

		{"mapping without namespace", func(s *specs.Spec, _ *Options) { s.Linux.UIDMappings = []specs.LinuxIDMapping{{Size: 1}} }, `linux.uidMappings: is given without a user namespace in linux.namespaces`},
		{"no mapping", func(s *specs.Spec, _ *Options) { userNamespace(s, nil, nil) }, `linux.uidMappings: is missing, want the mapping of the new user namespace`},
		{"empty mapping", func(s *specs.Spec, _ *Options) { userNamespace(s, []specs.LinuxIDMapping{{}}, nil) }, `linux.uidMappings[0].size: is 0, want the number of ids`},
		{"no group mapping", func(s *specs.Spec, _ *Options) { userNamespace(s, []specs.LinuxIDMapping{{Size: 1}}, nil) }, `linux.gidMappings: is missing, want the mapping of the new user namespace`},
		{"root unmapped", func(s *specs.Spec, _ *Options) {
			userNamespace(s, []specs.LinuxIDMapping{{ContainerID: 1, Size: 9}}, nil)
		}, `linux.uidMappings: does not map 0, the container's root`},
		{"user unmapped", func(s *specs.Spec, _ *Options) {
			s.Process.User.GID = 7
			userNamespace(s, []specs.LinuxIDMapping{{Size: 1}}, []specs.LinuxIDMapping{{Size: 7}})
		}, `linux.gidMappings: does not map 7, process.user.gid`},
		{"overlap", func(s *specs.Spec, _ *Options) {
			userNamespace(s, []specs.LinuxIDMapping{{Size: 10}, {ContainerID: 9, HostID: 100, Size: 1}}, nil)
		}, `linux.uidMappings[1]: overlaps with linux.uidMappings[0]`},
		{"mapping too long", func(s *specs.Spec, _ *Options) {
			userNamespace(s, []specs.LinuxIDMapping{{HostID: 2, Size: 1<<32 - 1}}, nil)
		}, `linux.uidMappings[0].size: is 4294967295, which leads past the last id`},

		{"device path", func(s *specs.Spec, _ *Options) { s.Linux.Devices = []specs.LinuxDevice{{Path: "dev", Type: "c"}} }, `linux.devices[0].path: "dev" is not absolute`},
		{"device type", func(s *specs.Spec, _ *Options) { s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/x", Type: "z"}} }, `linux.devices[0].type: "z" is not a type of device, want c, b, u or p`},
		{"device type missing", func(s *specs.Spec, _ *Options) { s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/x"}} }, `linux.devices[0].type: is missing, want c, b, u or p`},
		{"device major", func(s *specs.Spec, _ *Options) {
			s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/x", Type: "c", Major: 4096}}
		}, `linux.devices[0].major: is 4096, want 0 to 4095`},
		{"device minor", func(s *specs.Spec, _ *Options) {
			s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/x", Type: "b", Minor: -1}}
		}, `linux.devices[0].minor: is -1, want 0 to 1048575`},
		{"device of the host", func(s *specs.Spec, _ *Options) {
			s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/null", Type: "c", Major: 1, Minor: 3}, {Path: "/dev/kvm", Type: "c", Major: 10, Minor: 232}}
		}, `linux.devices[1]: "/dev/kvm" (c 10:232) is a device of the host, which a VM does not have`},

		{"sysctl of the host", func(s *specs.Spec, _ *Options) { s.Linux.Sysctl = map[string]string{"kernel.panic": "1"} }, `linux.sysctl["kernel.panic"]: is not kept apart by any namespace of the container`},
		{"sysctl name", func(s *specs.Spec, _ *Options) { s.Linux.Sysctl = map[string]string{"net..//": "1"} }, `linux.sysctl: "net..//" is not the name of a kernel parameter`},
		{"sysctl hostname", func(s *specs.Spec, _ *Options) { s.Linux.Sysctl = map[string]string{"kernel/hostname": "1"} }, `linux.sysctl["kernel/hostname"]: is set by the field hostname`},
		{"sysctl without ipc", func(s *specs.Spec, _ *Options) {
			dropNamespace(s, specs.IPCNamespace)
			s.Linux.Sysctl = map[string]string{"kernel.shmmax": "1"}
		}, `linux.sysctl["kernel.shmmax"]: cannot be set without an ipc namespace in linux.namespaces`},
		{"sysctl without user", func(s *specs.Spec, _ *Options) { s.Linux.Sysctl = map[string]string{"user.max_inotify_watches": "1"} }, `linux.sysctl["user.max_inotify_watches"]: cannot be set without a user namespace in linux.namespaces`},

		{"rdt", func(s *specs.Spec, _ *Options) { s.Linux.IntelRdt = &specs.LinuxIntelRdt{} }, `linux.intelRdt: is not supported: cache and bandwidth classes belong to the host's processors, which a VM does not see`},
		{"net devices", func(s *specs.Spec, _ *Options) { s.Linux.NetDevices = map[string]specs.LinuxNetDevice{"eth1": {}} }, `linux.netDevices: is not supported: a network device of the host cannot be moved into a VM`},
		{"memory policy", func(s *specs.Spec, _ *Options) {
			s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolBind, Nodes: "0"}
		}, `linux.memoryPolicy: is not supported: a VM has one memory node, want MPOL_DEFAULT or MPOL_LOCAL without nodes and flags`},
		{"personality", func(s *specs.Spec, _ *Options) { s.Linux.Personality = &specs.LinuxPersonality{Domain: "BSD"} }, `linux.personality.domain: is "BSD", want LINUX or LINUX32`},
		{"time offsets", func(s *specs.Spec, _ *Options) {
			s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"monotonic": {}}
		}, `linux.timeOffsets: cannot be set without a time namespace in linux.namespaces`},
		{"clock", func(s *specs.Spec, _ *Options) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
			s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"realtime": {}}
		}, `linux.timeOffsets: "realtime" is not a clock of a time namespace, want monotonic or boottime`},
		{"seccomp", func(s *specs.Spec, _ *Options) { s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: "x"} }, `linux.seccomp.defaultAction: "x" is not an action, want a name such as SCMP_ACT_ERRNO`},
		{"cgroup path", func(s *specs.Spec, o *Options) { s.Linux.CgroupsPath, o.SystemdCgroup = "/a/b", true }, `linux.cgroupsPath: is "/a/b", want slice:prefix:name, as --systemd-cgroup asks`},

		{"memory limit", func(s *specs.Spec, _ *Options) { s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: ptr(int64(-5))} }, `linux.resources.memory.limit: is -5, want bytes, or -1 for no limit`},
		{"swap alone", func(s *specs.Spec, _ *Options) { s.Linux.Resources.Memory = &specs.LinuxMemory{Swap: ptr(int64(5))} }, `linux.resources.memory.swap: is 5 without linux.resources.memory.limit, which it includes`},
		{"swap below limit", func(s *specs.Spec, _ *Options) {
			s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: ptr(int64(9)), Swap: ptr(int64(5))}
		}, `linux.resources.memory.swap: is 5, below linux.resources.memory.limit, 9, which it includes`},
		{"swappiness", func(s *specs.Spec, _ *Options) {
			s.Linux.Resources.Memory = &specs.LinuxMemory{Swappiness: ptr(uint64(101))}
		}, `linux.resources.memory.swappiness: is 101, want 0 to 100`},
		{"cpu quota", func(s *specs.Spec, _ *Options) { s.Linux.Resources.CPU = &specs.LinuxCPU{Quota: ptr(int64(5))} }, `linux.resources.cpu.quota: is 5, want at least 1000 microseconds, or -1 for no limit`},
		{"cpu period", func(s *specs.Spec, _ *Options) { s.Linux.Resources.CPU = &specs.LinuxCPU{Period: ptr(uint64(5))} }, `linux.resources.cpu.period: is 5, want 1000 to 1000000 microseconds`},
		{"cpu burst", func(s *specs.Spec, _ *Options) { s.Linux.Resources.CPU = &specs.LinuxCPU{Burst: ptr(uint64(5))} }, `linux.resources.cpu.burst: is 5 without linux.resources.cpu.quota, which it adds to`},
		{"cpu idle", func(s *specs.Spec, _ *Options) { s.Linux.Resources.CPU = &specs.LinuxCPU{Idle: ptr(int64(2))} }, `linux.resources.cpu.idle: is 2, want 0 or 1`},
		{"cpu list", func(s *specs.Spec, _ *Options) { s.Linux.Resources.CPU = &specs.LinuxCPU{Cpus: "3-1"} }, `linux.resources.cpu.cpus: "3-1" is not a list of numbers and ranges such as 0-2,7`},
		{"io weight", func(s *specs.Spec, _ *Options) {
			s.Linux.Resources.BlockIO = &specs.LinuxBlockIO{Weight: ptr(uint16(5))}
		}, `linux.resources.blockIO.weight: is 5, want 10 to 1000`},
		{"huge page", func(s *specs.Spec, _ *Options) {
			s.Linux.Resources.HugepageLimits = []specs.LinuxHugepageLimit{{Pagesize: "2M"}}
		}, `linux.resources.hugepageLimits[0].pageSize: is "2M", want a size such as 2MB`},
		{"rdma", func(s *specs.Spec, _ *Options) { s.Linux.Resources.Rdma = map[string]specs.LinuxRdma{"mlx": {}} }, `linux.resources.rdma: is not supported: the adapters belong to the host, and a VM has none`},
		{"unified path", func(s *specs.Spec, _ *Options) { s.Linux.Resources.Unified = map[string]string{"../memory.max": "1"} }, `linux.resources.unified: "../memory.max" is not a file of a cgroup controller, want a name such as memory.high`},
		{"unified core", func(s *specs.Spec, _ *Options) { s.Linux.Resources.Unified = map[string]string{"cgroup.procs": "1"} }, `linux.resources.unified: "cgroup.procs" is not a file of a cgroup controller, want a name such as memory.high`},
		{"unified value", func(s *specs.Spec, _ *Options) { s.Linux.Resources.Unified = map[string]string{"memory.high": ""} }, `linux.resources.unified["memory.high"]: is "", want what to write to the file`},
		{"device rule type", func(s *specs.Spec, _ *Options) { s.Linux.Resources.Devices[0].Type = "q" }, `linux.resources.devices[0].type: "q" is not a type of device, want a, b or c`},
		{"device rule access", func(s *specs.Spec, _ *Options) { s.Linux.Resources.Devices[0].Access = "rx" }, `linux.resources.devices[0].access: is "rx", want letters of rwm`},

		{"no id", func(_ *specs.Spec, o *Options) { o.ID = "" }, `translate config.json: the container's id is empty`},
		{"bundle", func(_ *specs.Spec, o *Options) { o.Bundle = "b" }, `translate config.json: the bundle "b" is not an absolute path`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			spec := Example(false)
			o := testOptions(nil)
			tc.edit(spec, &o)
			req, err := Translate(spec, o)
			switch {
			case err == nil:
				t.Errorf("it is accepted, want\n%s", tc.want)
			case err.Error() != tc.want:
				t.Errorf("got  %v\nwant %s", err, tc.want)
			case req != nil:
				t.Error("there is a request beside the error")
			}
		})
	}
}

func dropNamespace(s *specs.Spec, typ specs.LinuxNamespaceType) {
	var out []specs.LinuxNamespace
	for _, ns := range s.Linux.Namespaces {
		if ns.Type != typ {
			out = append(out, ns)
		}
	}
	s.Linux.Namespaces = out
}

func userNamespace(s *specs.Spec, uids, gids []specs.LinuxIDMapping) {
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	s.Linux.UIDMappings, s.Linux.GIDMappings = uids, gids
}

func TestVersionsAccepted(t *testing.T) {
	for _, v := range []string{"1.0.0", "1.0.2-dev", "1.0.0-rc5", "1.1.0+dev", "1.1.0-rc.1", "1.2.1", "1.3.0", "1.3.9-dev+x.y"} {
		if err := checkVersion(v); err != nil {
			t.Errorf("%s: %v", v, err)
		}
	}
}

func TestSysctlName(t *testing.T) {
	for _, tc := range []struct {
		key, want string
		ok        bool
	}{
		{"net.ipv4.ip_forward", "net.ipv4.ip_forward", true},
		{"net/ipv4/ip_forward", "net.ipv4.ip_forward", true},
		{"net/ipv4/conf/eno2.100/rp_filter", "net.ipv4.conf.eno2/100.rp_filter", true},
		{"net.ipv4.conf.eno2/100.rp_filter", "net.ipv4.conf.eno2/100.rp_filter", true},
		{"net", "", false},
		{"", "", false},
		{".", "", false},
		{"/net/ipv4", "", false},
		{"net.", "", false},
		{"net..ipv4", "", false},
		{"net.//.x", "", false},
		{"net./.x", "", false},
		{"net/../kernel/panic", "", false},
		{"net/./x", "", false},
		{"net.a b", "", false},
		{"net.\x00", "", false},
	} {
		got, ok := sysctlName(tc.key)
		if ok != tc.ok || ok && got != tc.want {
			t.Errorf("%q: %q %v, want %q %v", tc.key, got, ok, tc.want, tc.ok)
		}
	}
}

func TestParseList(t *testing.T) {
	for s, want := range map[string]int64{"": -1, "0": 0, "0-3": 3, "0-3,7": 7, "5,1": 5, " 1, 2": 2} {
		if got, err := parseList(s); err != nil || got != want {
			t.Errorf("%q: %d %v, want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"a", "1-", "-1", ",", "1,,2", "3-2", "0x1", "99999999"} {
		if _, err := parseList(s); err == nil {
			t.Errorf("%q is accepted", s)
		}
	}
}
