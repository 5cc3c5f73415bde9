package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"runtime/debug"

	"github.com/golang/glog"
	"golang.org/x/sys/unix"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/client"
	"github.com/hyperhq/runv/driverloader"
	"github.com/hyperhq/runv/factory"
	"github.com/hyperhq/runv/state"
	"github.com/hyperhq/runv/supervisor"
	"github.com/hyperhq/runv/trace"
	"github.com/hyperhq/runv/version"
)

// superviseMain is the supervisor of one pod, as package client starts it: args
// are the store's root, the sandbox id, and "debug" or "normal". What it prints
// is the pod's supervisor.log. It does not return.
func superviseMain(args []string, begun trace.Mark) {
	var err error
	switch {
	case len(args) == 2 && args[0] == standbyFlag:
		err = superviseStandby(begun)
	case len(args) == 3:
		setupGlog(args[2] == "debug")
		err = supervise(args[0], args[1], begun)
	default:
		err = errors.New("runv supervise is started by runv itself")
	}
	if err != nil {
		// One line, and the last: whoever waits for an answer quotes it.
		_, _ = fmt.Fprintln(os.Stderr, oneLine(err.Error()))
		glog.Flush()
		os.Exit(1)
	}
	glog.Flush()
	os.Exit(0)
}

func supervise(root, sandboxID string, begun trace.Mark) error {
	ctx, stop := supervisorContext()
	defer stop()
	api, err := inherited(client.APIListenerFD, "api")
	if err != nil {
		return err
	}
	stdio, err := inherited(client.IOListenerFD, "io")
	if err != nil {
		return err
	}
	unix.CloseOnExec(client.LifelineFD)
	lifeline := os.NewFile(client.LifelineFD, "lifeline")
	hostMounts, err := supervisor.PrepareProcess()
	if err != nil {
		return err
	}
	s := supervisor.New(supervisor.Options{
		Store:      state.Open(root),
		SandboxID:  sandboxID,
		Version:    version.String(),
		Begun:      begun,
		HostMounts: hostMounts,
		Factory:    newFactory,
	})
	return s.Serve(ctx, api, stdio, lifeline)
}

// supervisorContext sets the process up and returns a context that SIGTERM ends.
func supervisorContext() (context.Context, context.CancelFunc) {
	// Little is alive at a time, and the process lives as long as the pod.
	debug.SetGCPercent(50)
	// A terminal that is closed somewhere is no reason to end. The signals are
	// taken and dropped rather than ignored: hooks would inherit that.
	signal.Notify(make(chan os.Signal, 1), unix.SIGHUP, unix.SIGINT, unix.SIGPIPE)
	return signal.NotifyContext(context.Background(), unix.SIGTERM)
}

// newFactory finds the driver that a request asks for, and clones if it names a
// template, or a policy that does for a VM of its size.
func newFactory(ctx context.Context, vm *supervisorv1.VM) (factory.Factory, string, error) {
	d, err := driverloader.Probe(ctx, vm.Driver, driverloader.Options{QEMUPath: vm.QemuPath})
	if err != nil {
		return nil, "", err
	}
	f, err := factory.ForPod(d, vm.Factory, vm.Template, factory.Policy(vm.TemplatePolicy))
	return f, d.Name(), err
}

// inherited is a listening socket that the caller has made.
func inherited(fd uintptr, name string) (net.Listener, error) {
	f := os.NewFile(fd, name)
	l, err := net.FileListener(f)
	_ = f.Close()
	if err != nil {
		return nil, fmt.Errorf("inherited %s socket: %w", name, err)
	}
	return l, nil
}
