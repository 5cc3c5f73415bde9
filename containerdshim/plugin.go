package containerdshim

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/supervisor"
)

// Serve is everything but `start`: the shim itself, `delete` and the answers to
// -v and -info. It does not return when it fails.
func Serve(ctx context.Context, factory supervisor.FactoryFunc) {
	registry.Register(&plugin.Registration{
		Type:     plugins.TTRPCPlugin,
		ID:       "task",
		Requires: []plugin.Type{plugins.EventPlugin, plugins.InternalPlugin},
		InitFn: func(ic *plugin.InitContext) (any, error) {
			return newPlugin(ic, factory)
		},
	})
	// Children are waited for by whoever started them: the library must not take
	// their ends away, and orphans are nobody's here.
	shim.RunShim(ctx, Manager{}, func(c *shim.Config) { c.NoReaper, c.NoSubreaper = true, true })
}

func newPlugin(ic *plugin.InitContext, factory supervisor.FactoryFunc) (any, error) {
	pub, err := ic.GetByID(plugins.EventPlugin, "publisher")
	if err != nil {
		return nil, err
	}
	end, err := ic.GetByID(plugins.InternalPlugin, "shutdown")
	if err != nil {
		return nil, err
	}
	ns, err := namespaces.NamespaceRequired(ic.Context)
	if err != nil {
		return nil, err
	}
	unix.CloseOnExec(MountsFD)
	mounts := os.NewFile(MountsFD, "host's mounts")
	if typ, err := unix.IoctlRetInt(MountsFD, unix.NS_GET_NSTYPE); err != nil || typ != unix.CLONE_NEWNS {
		return nil, errors.New("the shim is started by its own command start")
	}
	if err := supervisor.KeepMounts(); err != nil {
		return nil, err
	}
	publisher, ok := pub.(shim.Publisher)
	if !ok {
		return nil, fmt.Errorf("the publisher is a %T", pub)
	}
	sd, ok := end.(shutdown.Service)
	if !ok {
		return nil, fmt.Errorf("the shutdown service is a %T", end)
	}
	debug := false
	if o, ok := ic.Context.Value(shim.OptsKey{}).(shim.Opts); ok {
		debug = o.Debug
	}
	return newService(ic.Context, Options{
		Namespace: ns, HostMounts: mounts, Factory: factory, Publisher: publisher, Shutdown: sd, Debug: debug,
	}), nil
}
