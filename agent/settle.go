package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// trialTime bounds the trial container.
const trialTime = 30 * time.Second

var (
	errSettled = errors.New("the guest has an identity already; only a fresh one can be settled")
	errTrials  = errors.New("containers from before the sandbox was configured are still there")
)

// settle prepares the guest for being saved, or with shares for waiting until it
// is a pod's. What cannot be tried is left out, and said: containers start more
// slowly then.
func (a *Agent) settle(ctx context.Context, shares []*agentv1.Share) (skipped string, err error) {
	if err := checkShares(shares); err != nil {
		return "", err
	}
	a.configuring.Lock()
	defer a.configuring.Unlock()
	a.mu.Lock()
	configured := a.configured
	a.mu.Unlock()
	if configured {
		return "", errSettled
	}
	if err := a.system.Settle(ctx); err != nil {
		return "", err
	}
	// Pods begin with no card and get theirs when their hooks have run. Here a
	// driver that is built into the kernel loses them, once and not in each clone.
	if err := a.system.ConfigureNetwork(&agentv1.NetworkConfig{}); err != nil {
		return "", fmt.Errorf("try the network: %w", err)
	}
	if len(shares) > 0 {
		if err := a.waitWith(shares); err != nil {
			return "", err
		}
	} else if err := a.try(ctx); err != nil {
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
		a.log.Printf("settle: %v", err)
		skipped = err.Error()
	}
	// Now, for the trial would take the cgroup.
	if err := a.engine.Prepare(); err != nil {
		a.log.Printf("settle: %v", err)
		skipped = strings.TrimPrefix(skipped+"; "+err.Error(), "; ")
	}
	useMessages()
	spareThreads()
	// The garbage of the boot is collected here and not in every clone.
	runtime.GC()
	return skipped, nil
}

// spare is how many threads of the agent wait for something to do: enough for what
// works at a time until a container runs.
const spare = 8

// spareThreads lets Go's runtime have threads that are idle. It makes one whenever
// it needs one, and keeps it; to make one is much for a guest that has just been
// cloned.
func spareThreads() {
	var wg sync.WaitGroup
	var all sync.WaitGroup
	all.Add(spare)
	for range spare {
		wg.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			all.Done()
			all.Wait() // a thread of its own for each until all have one
		})
	}
	wg.Wait()
}

// waitWith mounts shares, and allows containers that are no pod's.
func (a *Agent) waitWith(shares []*agentv1.Share) error {
	if err := a.mountShares(shares); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.trials = true
	return nil
}

// useMessages encodes and decodes every kind of message once: the library works
// out how, by reflection, when one is used for the first time.
func useMessages() {
	protoregistry.GlobalTypes.RangeMessages(func(kind protoreflect.MessageType) bool {
		m := kind.New()
		m.Range(func(protoreflect.FieldDescriptor, protoreflect.Value) bool { return true })
		if b, err := proto.Marshal(m.Interface()); err == nil {
			_ = proto.Unmarshal(b, kind.New().Interface())
		}
		return true
	})
}

// try runs a container that does nothing, so that the kernel and the agent have
// done everything once that the first container of a clone is going to need.
func (a *Agent) try(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(ctx, trialTime)
	defer cancel()
	defer func() {
		if err != nil {
			err = fmt.Errorf("trial container: %w", err)
		}
	}()
	defer a.survive(&err)
	req, undo, err := a.system.Trial()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, undo()) }()
	c, err := a.engine.New(req)
	if err != nil {
		return err
	}
	p, err := c.Create(ctx, Stdio{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Destroy()) }()
	if err := c.Start(ctx); err != nil {
		return err
	}
	select {
	case <-p.Child.Done():
	case <-ctx.Done():
		return ctx.Err()
	}
	if s := p.Child.Exit().Status; s != 0 {
		return fmt.Errorf("its program ended with status %#x", int(s))
	}
	return nil
}

// settleModules are those that are loaded when a container needs them, and that
// most do.
var settleModules = []string{"overlay", "af_packet", "fs-9p"}

// Settle implements System.
func (g *Guest) Settle(ctx context.Context) error {
	if err := g.Ready(ctx); err != nil {
		return err
	}
	for _, name := range settleModules {
		if err := g.modules.load(name); err != nil && !errors.Is(err, errNoModule) {
			g.log.Print(err)
		}
	}
	// No card is plugged: a clone may be of a pod without a network.
	if err := g.loadCardDriver(); err != nil && !errors.Is(err, errNoModule) {
		g.log.Print(err)
	}
	return nil
}

const (
	trialName = "runv-trial"
	// trialDir is on the file system of the agent's own program, which is linked
	// into it as the trial's program.
	trialDir = "/." + trialName
)

// Trial implements System.
func (g *Guest) Trial() (_ *agentv1.CreateContainerRequest, _ func() error, err error) {
	share := filepath.Join(agentv1.ShareDir, trialName)
	undo := func() error {
		err := unix.Unmount(share, 0)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			err = nil // not mounted
		}
		return errors.Join(err, os.RemoveAll(share), os.RemoveAll(trialDir))
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, undo())
		}
	}()
	root := filepath.Join(trialDir, "rootfs")
	for _, dir := range []string{share, root} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, nil, err
		}
	}
	if err := os.Link(ModuleLoader, filepath.Join(root, "agent")); err != nil {
		return nil, nil, err
	}
	if err := unix.Mount(trialDir, share, "", unix.MS_BIND, ""); err != nil {
		return nil, nil, fmt.Errorf("bind %s: %w", trialDir, err)
	}
	return trialRequest(), undo, nil
}

// trialRequest is a container as engines make most of theirs.
func trialRequest() *agentv1.CreateContainerRequest {
	const nosuid, noexec, nodev = unix.MOUNT_ATTR_NOSUID, unix.MOUNT_ATTR_NOEXEC, unix.MOUNT_ATTR_NODEV
	req := &agentv1.CreateContainerRequest{
		ContainerId: trialName,
		Rootfs:      &agentv1.Rootfs{ShareTag: trialName, SharePath: "rootfs"},
		Mounts: []*agentv1.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", AttrSet: nosuid | noexec | nodev},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", AttrSet: nosuid | unix.MOUNT_ATTR_STRICTATIME, Data: []string{"mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", AttrSet: nosuid | noexec, Data: []string{"newinstance", "ptmxmode=0666", "mode=0620"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", AttrSet: nosuid | noexec | nodev, Data: []string{"mode=1777", "size=65536k"}},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", AttrSet: nosuid | noexec | nodev},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", AttrSet: nosuid | noexec | nodev | unix.MOUNT_ATTR_RDONLY},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", AttrSet: nosuid | noexec | nodev | unix.MOUNT_ATTR_RDONLY},
		},
		Hostname:      trialName,
		MaskedPaths:   []string{"/proc/kcore", "/proc/keys", "/sys/firmware"},
		ReadonlyPaths: []string{"/proc/sys", "/proc/sysrq-trigger"},
		Resources:     &agentv1.Resources{Unified: map[string]string{"memory.max": "max", "pids.max": "max", "cpu.max": "max"}},
		Process: &agentv1.Process{
			Args: []string{"/agent", "--version"}, Cwd: "/", Env: []string{"PATH=/"},
			User: &agentv1.User{}, Capabilities: &agentv1.Capabilities{}, NoNewPrivileges: true,
		},
	}
	for _, typ := range []agentv1.Namespace_Type{
		agentv1.Namespace_TYPE_PID, agentv1.Namespace_TYPE_MOUNT, agentv1.Namespace_TYPE_IPC, agentv1.Namespace_TYPE_UTS,
		agentv1.Namespace_TYPE_CGROUP,
	} {
		req.Namespaces = append(req.Namespaces, &agentv1.Namespace{Type: typ})
	}
	return req
}
