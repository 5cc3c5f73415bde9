package supervisor_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"

	"github.com/containerd/ttrpc"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/factory"
	"github.com/hyperhq/runv/hypervisor/hvtest"
	"github.com/hyperhq/runv/state"
	"github.com/hyperhq/runv/supervisor"
)

// A program that holds a pod itself makes the sockets, serves, and ends the pod
// by its context.
func Example() {
	root, err := os.MkdirTemp("", "runv")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(root)
	store := state.Open(root)
	if err := store.Reserve("pod1"); err != nil {
		fmt.Println(err)
		return
	}
	listen := func(name string) net.Listener {
		l, err := net.Listen("unix", filepath.Join(store.Dir("pod1"), name))
		if err != nil {
			panic(err)
		}
		return l
	}
	api, stdio := listen(supervisorv1.APISocket), listen(supervisorv1.IOSocket)

	// A real program takes the driver from driverloader.Probe.
	driver := &hvtest.Driver{Guest: func(agent net.Conn) { _, _ = io.Copy(io.Discard, agent) }}
	s := supervisor.New(supervisor.Options{
		Store: store, SandboxID: "pod1", Version: "1.0",
		Factory: func(context.Context, *supervisorv1.VM) (factory.Factory, string, error) {
			return factory.Direct(driver), driver.Name(), nil
		},
	})
	ctx, end := context.WithCancel(context.Background())
	defer end()
	served := make(chan error)
	go func() { served <- s.Serve(ctx, api, stdio, nil) }()

	conn, err := net.Dial("unix", api.Addr().String())
	if err != nil {
		fmt.Println(err)
		return
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	info, err := supervisorv1.NewSupervisorClient(client).Info(ctx, &supervisorv1.InfoRequest{})
	fmt.Println(info.GetSandboxId(), info.GetVersion(), err)
	end()
	fmt.Println(<-served)
	// Output:
	// pod1 1.0 <nil>
	// <nil>
}
