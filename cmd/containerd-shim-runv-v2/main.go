// Command containerd-shim-runv-v2 is containerd's shim for pods of runv, package
// containerdshim. containerd starts it by the name that the runtime
// io.containerd.runv.v2 gives.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	containerdversion "github.com/containerd/containerd/v2/version"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/containerdshim"
	"github.com/hyperhq/runv/driverloader"
	"github.com/hyperhq/runv/factory"
	"github.com/hyperhq/runv/standin"
	"github.com/hyperhq/runv/version"
)

func main() {
	// A stand-in of one of the pod's processes is this program, too.
	if len(os.Args) > 1 && os.Args[1] == standin.Command {
		standin.Main(os.Args[2:])
	}
	if len(os.Args) > 1 && os.Args[1] == containerdshim.MountCommand {
		check(containerdshim.MountMain(os.Args[2:], os.Stdin))
		return
	}
	args := os.Args
	if len(args) > 1 && args[len(args)-1] == "start" {
		check(containerdshim.StartMain(context.Background(), args, os.Stdin, os.Stdout))
		return
	}
	// glog and containerd's library both want the flag -v of the program.
	glogFlags := flag.CommandLine
	flag.CommandLine = flag.NewFlagSet(args[0], flag.ExitOnError)
	_ = glogFlags.Set("logtostderr", "true")
	for _, a := range args[1:] {
		if a == "-debug" || a == "--debug" {
			_ = glogFlags.Set("v", "4")
		}
	}
	containerdversion.Version, containerdversion.Revision = version.Version, version.Commit
	containerdshim.Serve(context.Background(), newFactory)
}

// check ends the program with what went wrong.
func check(err error) {
	if err != nil {
		_, _ = fmt.Fprintf(os.Stderr, "%s: %s\n", filepath.Base(os.Args[0]), oneLine(err.Error()))
		os.Exit(1)
	}
}

// oneLine joins the lines of joined errors.
func oneLine(s string) string {
	return strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
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
