// Command runv-agent is the first process of runv's guest. It prepares the
// guest and serves the host's requests until the VM ends; see package agent.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"

	ctrdlog "github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/agent"
	"github.com/hyperhq/runv/agent/container"
	"github.com/hyperhq/runv/agent/spawn"
	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// version is set by the build.
var version = "unknown"

// The main goroutine keeps the main thread, so that no other goroutine can
// change that thread's namespaces: they are what /proc/1 and new threads show.
func init() { runtime.LockOSThread() }

func main() {
	if len(os.Args) == 2 {
		switch os.Args[1] {
		case "--version":
			fmt.Fprintf(os.Stdout, "runv-agent version %s, protocol %d, %s\n", version, agentv1.ProtocolVersion, runtime.Version())
			return
		case "container-init":
			container.RunInit()
			return
		}
	}
	// The kernel wants a module: /init -q -- NAME.
	if len(os.Args) == 4 && os.Args[0] == agent.ModuleLoader && os.Args[1] == "-q" && os.Getpid() != 1 {
		if err := agent.LoadForKernel(os.Args[3], log.New(os.Stderr, "", 0)); err != nil {
			os.Exit(1)
		}
		return
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "runv-agent: this program is the first process of a guest; it does nothing elsewhere")
		os.Exit(1)
	}
	err := run()
	// There is nothing that could go on: let the hypervisor end. If it does
	// not, the kernel panics at the end of pid 1.
	fmt.Fprintln(os.Stderr, "runv-agent: fatal:", err)
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	os.Exit(1)
}

func run() error {
	if err := agent.Boot(); err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	params, err := agent.ParseParams(string(cmdline))
	if err != nil {
		return err
	}
	logger := log.New(os.Stderr, "runv-agent: ", 0)
	level := ctrdlog.ErrorLevel
	if params.Debug {
		logger.SetFlags(log.Lmicroseconds)
		level = ctrdlog.DebugLevel
	}
	// Of the ttrpc library's log; what matters is in the answers.
	if err := ctrdlog.SetLevel(level.String()); err != nil {
		return err
	}
	// Containers get a hard limit that a server can live with; the soft one is
	// lowered again for each (see spawn.Spec).
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: openFiles, Max: openFiles}); err != nil {
		return fmt.Errorf("raise the limit of open files: %w", err)
	}
	// The agent's own memory is small; collecting it late costs the containers.
	debug.SetGCPercent(50)

	ctx := context.Background()
	go reap()
	guest := agent.NewGuest(ctx, logger)
	a := agent.New(version, guest, newEngine(), logger)
	var l agent.Listener = &agent.Serial{}
	if params.Vsock {
		if err := guest.Ready(ctx); err != nil {
			return err
		}
		if l, err = agent.ListenVsock(agentv1.VsockPort); err != nil {
			return err
		}
	}
	if params.Debug {
		logger.Printf("version %s waits for the host", version)
	}
	// Not here: each of its waits would be a switch to the main thread and back.
	served := make(chan error, 1)
	go func() { served <- a.Serve(ctx, l) }()
	return errors.Join(<-served, errors.New("the agent has stopped serving"))
}

// openFiles is the limit of open files of the guest's processes.
const openFiles = 1 << 20

// reap collects the processes that end, the orphans of containers among them.
func reap() {
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, unix.SIGCHLD)
	for {
		spawn.ReapAll()
		<-ended
	}
}
