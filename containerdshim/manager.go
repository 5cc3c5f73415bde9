package containerdshim

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/hyperhq/runv/bundle"
	"github.com/hyperhq/runv/client"
	"github.com/hyperhq/runv/ocispec"
	"github.com/hyperhq/runv/state"
	"github.com/hyperhq/runv/version"
)

// Name is how containerd's configuration names the runtime.
const Name = "io.containerd.runv.v2"

// MountsFD is the descriptor on which the shim finds the mount namespace of
// whoever started it. The listening socket is the one before it, as containerd's
// library has it.
const MountsFD = 4

const (
	// apiVersion is the Task API that a containerd is told of that reads more
	// than an address.
	apiVersion = 3
	// maxStart bounds what is read from containerd at the start.
	maxStart = 10 << 20
	// addressFile is where containerd before 2.0 finds a shim again.
	addressFile = "address"
	// socketDirLink names the directory of the socket for containerd's library.
	socketDirLink = "s"
	// stopLimit bounds `delete`. containerd waits for 5 seconds, and for the
	// answer of a shim that hangs there is SIGKILL.
	stopLimit = 30 * time.Second
)

// Manager starts shims and cleans up after them.
type Manager struct{}

var _ shim.Shim = Manager{}

// Name implements shim.Shim.
func (Manager) Name() string { return Name }

// Info implements shim.Shim.
func (Manager) Info(context.Context, io.Reader) (*types.RuntimeInfo, error) {
	features, err := typeurl.MarshalAnyToProto(ocispec.Features())
	if err != nil {
		return nil, err
	}
	return &types.RuntimeInfo{
		Name:     Name,
		Version:  &types.RuntimeVersion{Version: version.Version, Revision: version.Commit},
		Features: features,
	}, nil
}

// StartMain is the command `start`: args are those of the program. It answers
// every containerd in its own way: those since 2.3 with a message, others with
// the address alone, which means version 2 of the Task API.
func StartMain(ctx context.Context, args []string, stdin io.Reader, stdout io.Writer) error {
	params := new(bootapi.BootstrapParams)
	var debug bool
	f := flag.NewFlagSet(filepath.Base(args[0]), flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.StringVar(&params.Namespace, "namespace", "", "namespace that owns the shim")
	f.StringVar(&params.InstanceID, "id", "", "id of the task")
	f.StringVar(&params.ContainerdGrpcAddress, "address", "", "address of containerd")
	f.BoolVar(&debug, "debug", false, "debug output in logs")
	for _, name := range []string{"publish-binary", "socket", "debug-socket", "bundle"} {
		f.String(name, "", "accepted")
	}
	if err := f.Parse(args[1:]); err != nil {
		return err
	}
	if debug {
		params.LogLevel = bootapi.LogLevel_LOG_LEVEL_DEBUG
	}
	input, err := io.ReadAll(io.LimitReader(stdin, maxStart))
	if err != nil {
		return fmt.Errorf("read from containerd: %w", err)
	}
	sent, recent := bootstrap(input, params)
	if recent {
		params = sent
	} else if options := new(anypb.Any); proto.Unmarshal(input, options) == nil {
		params.Extensions = []*bootapi.Extension{{Value: options}}
	}
	ctx = namespaces.WithNamespace(ctx, params.Namespace)
	result, err := Manager{}.Start(ctx, params)
	if err != nil {
		return err
	}
	answer := []byte(result.Address)
	if recent {
		if answer, err = proto.Marshal(result); err != nil {
			return err
		}
	} else if err := replaceFile(addressFile, answer); err != nil {
		return err
	}
	_, err = stdout.Write(answer)
	return err
}

// bootstrap decodes what containerd since 2.3 sends. Before, it was the runtime's
// options, which could be read as the same message: the names tell them apart.
func bootstrap(input []byte, flags *bootapi.BootstrapParams) (*bootapi.BootstrapParams, bool) {
	p := new(bootapi.BootstrapParams)
	if len(input) == 0 || proto.Unmarshal(input, p) != nil {
		return nil, false
	}
	return p, p.InstanceID == flags.InstanceID && p.Namespace == flags.Namespace
}

// Start implements shim.Shim: it starts the shim of the pod that the bundle in
// the working directory belongs to, unless there is one.
func (Manager) Start(ctx context.Context, params *bootapi.BootstrapParams) (_ *bootapi.BootstrapResult, err error) {
	cwd, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	group, err := groupOf(cwd, params)
	if err != nil {
		return nil, err
	}
	result := &bootapi.BootstrapResult{Version: apiVersion, Protocol: "ttrpc"}
	if result.Address, err = socketAddress(ctx, params, group); err != nil {
		return nil, err
	}
	l, err := listen(result.Address)
	if err != nil {
		return nil, err
	}
	if l == nil {
		return result, nil // it runs
	}
	defer l.Close()
	var undo []func()
	defer func() {
		if err != nil {
			for i := len(undo) - 1; i >= 0; i-- {
				undo[i]()
			}
		}
	}()
	undo = append(undo, func() { _ = shim.RemoveSocket(result.Address) })
	if dir := params.GetSocketDir(); dir != "" {
		// The library of the shim itself removes the socket there at the end.
		_ = os.Remove(socketDirLink)
		if err := os.Symlink(dir, socketDirLink); err != nil {
			return nil, err
		}
	}
	cmd, err := daemon(params, l)
	if err != nil {
		return nil, err
	}
	undo = append(undo, func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	ref, err := state.RefOf(cmd.Process.Pid)
	if err != nil {
		return nil, fmt.Errorf("the shim ended at once: %w", err)
	}
	if err := (&record{Shim: ref, Own: true, Address: result.Address}).write("."); err != nil {
		return nil, err
	}
	if err := shim.AdjustOOMScore(cmd.Process.Pid); err != nil {
		return nil, err
	}
	return result, nil
}

// groupOf is the pod of the container whose bundle is dir: containers of one pod
// have one shim. The pod is named by annotations, or by the path of a namespace of
// one of its containers.
func groupOf(dir string, params *bootapi.BootstrapParams) (string, error) {
	id := params.GetInstanceID()
	f, err := os.Open(filepath.Join(dir, bundle.SpecFile))
	if err != nil {
		return "", err
	}
	defer f.Close()
	// Nothing else is of interest yet, and Create reports what is wrong.
	type namespace struct {
		Path string `json:"path"`
	}
	var spec struct {
		Annotations map[string]string `json:"annotations"`
		Linux       struct {
			Namespaces []namespace `json:"namespaces"`
		} `json:"linux"`
	}
	if err := json.NewDecoder(f).Decode(&spec); err != nil {
		return "", fmt.Errorf("%s: %w", bundle.SpecFile, err)
	}
	p, err := ocispec.PodOf(spec.Annotations)
	if err != nil {
		return "", err
	}
	switch {
	case p.ID != "":
		return p.ID, nil
	case p.Sandbox:
		return id, nil
	}
	if !slices.ContainsFunc(spec.Linux.Namespaces, func(ns namespace) bool { return ns.Path != "" }) {
		return id, nil
	}
	set, err := loadSettings(optionsOf(params), params.GetNamespace())
	if err != nil {
		return id, nil
	}
	pods := client.New(client.Options{Store: state.Open(set.root)})
	sandbox, err := bundle.SandboxOf(bundle.Options{ID: id, Dir: dir, Pods: pods})
	if err != nil {
		return id, nil
	}
	return sandbox, nil
}

// optionsOf finds the runtime's options in what containerd sends; nil if there
// are none.
func optionsOf(params *bootapi.BootstrapParams) *anypb.Any {
	for _, e := range params.GetExtensions() {
		if knownOptions(e.GetValue()) {
			return e.GetValue()
		}
	}
	return nil
}

func socketAddress(ctx context.Context, params *bootapi.BootstrapParams, group string) (string, error) {
	if dir := params.GetSocketDir(); dir != "" {
		return shim.CreateSocketAddress(ctx, dir, params.GetContainerdGrpcAddress(), group, false)
	}
	return shim.SocketAddress(ctx, params.GetContainerdGrpcAddress(), group, false)
}

// listen makes the shim's socket; nil if a shim listens there.
func listen(address string) (*net.UnixListener, error) {
	for again := true; ; again = false {
		l, err := shim.NewSocket(address)
		switch {
		case err == nil:
			// The file belongs to the shim.
			l.SetUnlinkOnClose(false)
			return l, nil
		case !again || !shim.SocketEaddrinuse(err):
			return nil, fmt.Errorf("make the shim's socket: %w", err)
		case shim.CanConnect(address):
			return nil, nil
		}
		// Left behind by a shim that was killed.
		if err := shim.RemoveSocket(address); err != nil {
			return nil, fmt.Errorf("remove the socket of a shim that is gone: %w", err)
		}
	}
}

// daemon starts the shim itself, in a mount namespace of its own.
func daemon(params *bootapi.BootstrapParams, l *net.UnixListener) (*exec.Cmd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cwd, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	socket, err := l.File()
	if err != nil {
		return nil, err
	}
	defer socket.Close()
	mounts, err := os.Open("/proc/self/ns/mnt")
	if err != nil {
		return nil, err
	}
	defer mounts.Close()
	args := []string{"-namespace", params.GetNamespace(), "-id", params.GetInstanceID(), "-address", params.GetContainerdGrpcAddress()}
	if params.GetLogLevel() <= bootapi.LogLevel_LOG_LEVEL_DEBUG {
		args = append(args, "-debug")
	}
	cmd := exec.Command(self, args...)
	cmd.Dir = cwd
	cmd.Env = os.Environ()
	if a := params.GetContainerdTtrpcAddress(); a != "" {
		cmd.Env = append(cmd.Env, "TTRPC_ADDRESS="+a)
	}
	cmd.ExtraFiles = []*os.File{socket, mounts}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Cloneflags: unix.CLONE_NEWNS}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the shim: %w", err)
	}
	return cmd, nil
}

// Stop implements shim.Shim: it is the command `delete`, which containerd calls
// when it cannot speak with a shim (any more), and removes whatever is left of
// the container of a bundle.
func (Manager) Stop(ctx context.Context, id string) (shim.StopStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, stopLimit)
	defer cancel()
	dir, err := bundleDir(ctx)
	if err != nil {
		return shim.StopStatus{}, err
	}
	gone := shim.StopStatus{ExitStatus: int(killedStatus), ExitedAt: time.Now()}
	rec, err := readRecord(dir)
	if err != nil {
		return shim.StopStatus{}, err
	}
	if rec == nil {
		return gone, nil // nothing was started for it
	}
	if rec.Own {
		// Whether it hangs or containerd gave it up: nobody will ask it again. The
		// VM and the stand-ins end with it.
		if err := rec.Shim.Signal(unix.SIGKILL); err != nil && !errors.Is(err, state.ErrGone) {
			return shim.StopStatus{}, fmt.Errorf("end the shim: %w", err)
		}
		if err := rec.Shim.Wait(ctx); err != nil {
			return shim.StopStatus{}, fmt.Errorf("wait for the end of the shim: %w", err)
		}
		if rec.Address != "" {
			_ = shim.RemoveSocket(rec.Address)
		}
	}
	if rec.Root == "" {
		return gone, nil
	}
	c := client.New(client.Options{
		Store: state.Open(rec.Root),
		Warn:  func(err error) { log.G(ctx).WithError(err).Warn("delete") },
	})
	if ct, err := c.Get(id); err == nil && !ct.HalfMade {
		gone.Pid = ct.StandIn.Pid
		if ct.Record.Status == state.Stopped {
			gone.ExitStatus = ct.ExitCode
		}
	}
	if err := c.Delete(ctx, id, true); err != nil && !errors.Is(err, client.ErrNotFound) {
		return shim.StopStatus{}, err
	}
	return gone, nil
}

// bundleDir is the bundle that `delete` is about.
func bundleDir(ctx context.Context) (string, error) {
	if o, ok := ctx.Value(shim.OptsKey{}).(shim.Opts); ok && o.BundlePath != "" {
		return o.BundlePath, nil
	}
	return os.Getwd()
}
