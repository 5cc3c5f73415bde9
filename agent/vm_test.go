package agent

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// guestDir returns the directory of the guest image that tests in a VM boot.
func guestDir(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("RUNV_TEST_GUEST")
	if dir == "" {
		t.Skip("needs RUNV_TEST_GUEST, the directory of a guest image (runv manage build-guest --output)")
	}
	for _, f := range []string{"kernel", "initrd.img"} {
		if _, err := os.Stat(filepath.Join(dir, f)); err != nil {
			t.Skip("needs a guest image:", err)
		}
	}
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("needs QEMU:", err)
	}
	return dir
}

// bootVM boots the guest image and returns the agent's byte stream.
func bootVM(t *testing.T, share string, extra ...string) io.ReadWriteCloser {
	t.Helper()
	dir := guestDir(t)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	own, theirs := os.NewFile(uintptr(fds[0]), "host"), os.NewFile(uintptr(fds[1]), "guest")
	conn, err := net.FileConn(own)
	_ = own.Close()
	if err != nil {
		t.Fatal(err)
	}
	accel, tsc := "tcg", ""
	if khz := os.Getenv("RUNV_TEST_TSC_KHZ"); khz != "" {
		tsc = " tsc_early_khz=" + khz + " tsc=reliable"
	}
	args := []string{
		"-machine", "microvm,acpi=on,pit=on,pic=on,rtc=on,isa-serial=on,accel=" + accel, "-cpu", "max", "-m", "512",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
		"-kernel", filepath.Join(dir, "kernel"), "-initrd", filepath.Join(dir, "initrd.img"),
		"-append", "console=ttyS0 quiet reboot=t panic=-1 runv.debug" + tsc,
		"-device", "virtio-serial-device",
		"-chardev", "socket,id=agent,fd=3", "-device", "virtserialport,chardev=agent,name=" + agentv1.SerialPortName,
		"-fsdev", "local,id=share,path=" + share + ",security_model=passthrough", "-device", "virtio-9p-device,fsdev=share,mount_tag=" + agentv1.ShareTag,
	}
	cmd := exec.Command("qemu-system-x86_64", append(args, extra...)...)
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // also when the test is killed
	console := &consoleLog{t: t, start: time.Now()}
	cmd.Stdout, cmd.Stderr = console, console
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = theirs.Close()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		_ = conn.Close()
	})
	return conn
}

// consoleLog writes the guest's console into the test's log, line by line.
type consoleLog struct {
	t     *testing.T
	start time.Time
	mu    sync.Mutex
	part  []byte
}

func (c *consoleLog) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.part = append(c.part, b...)
	for {
		l, rest, ok := bytes.Cut(c.part, []byte("\n"))
		if !ok {
			return len(b), nil
		}
		c.t.Logf("%6.3f console: %s", time.Since(c.start).Seconds(), bytes.TrimRight(l, "\r"))
		c.part = rest
	}
}

// busyboxRoot makes a root file system below the share.
func busyboxRoot(t *testing.T, dir string) {
	t.Helper()
	b, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skip("needs a static busybox:", err)
	}
	for _, d := range []string{"bin", "proc", "sys", "dev", "etc", "tmp"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "bin/busybox"), b, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{"sh", "cat", "echo", "ps", "hostname", "sleep", "head", "wc", "id", "ip", "stty", "mount", "nslookup", "wget", "yes", "date", "kill", "ls", "md5sum", "dd", "true", "mkdir"} {
		if err := os.Symlink("busybox", filepath.Join(dir, "bin", n)); err != nil {
			t.Fatal(err)
		}
	}
}

// request is a container with the usual namespaces and mounts.
func request(id string, args ...string) *agentv1.CreateContainerRequest {
	all := uint64(1)<<41 - 1
	r := &agentv1.CreateContainerRequest{
		ContainerId: id,
		Rootfs:      &agentv1.Rootfs{ShareTag: agentv1.ShareTag, SharePath: "rootfs"},
		Hostname:    "in-" + id,
		Mounts: []*agentv1.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Data: []string{"mode=755"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Data: []string{"newinstance", "ptmxmode=0666", "mode=0620"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs"},
		},
		GuestResolvConf: true,
		Process: &agentv1.Process{
			Args: args, Env: []string{"PATH=/bin", "TERM=linux"}, Cwd: "/", User: &agentv1.User{},
			Capabilities: &agentv1.Capabilities{Bounding: all, Effective: all, Permitted: all},
		},
		Stdio: &agentv1.Stdio{Stdin: true, Stdout: true, Stderr: true},
	}
	for _, n := range []agentv1.Namespace_Type{
		agentv1.Namespace_TYPE_PID, agentv1.Namespace_TYPE_MOUNT, agentv1.Namespace_TYPE_IPC, agentv1.Namespace_TYPE_UTS, agentv1.Namespace_TYPE_CGROUP,
	} {
		r.Namespaces = append(r.Namespaces, &agentv1.Namespace{Type: n})
	}
	return r
}

func TestVM(t *testing.T) {
	share := t.TempDir()
	busyboxRoot(t, filepath.Join(share, "rootfs"))
	start := time.Now()
	step := func(format string, a ...any) {
		t.Helper()
		t.Logf("%6.3f %s", time.Since(start).Seconds(), fmt.Sprintf(format, a...))
	}
	h := newHost(t, bootVM(t, share, "-netdev", "user,id=n0", "-device", "virtio-net-device,netdev=n0"))
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	step("hello: %v", h.hello(ctx))
	if _, err := h.ConfigureSandbox(ctx, &agentv1.ConfigureSandboxRequest{
		SandboxId: "pod", Shares: []*agentv1.Share{{Tag: agentv1.ShareTag, Type: "9p", Options: "cache=none"}},
		Network: &agentv1.Network{Mode: agentv1.Network_MODE_DHCP},
	}); err != nil {
		t.Fatal(err)
	}
	step("sandbox configured")

	out, errs := collect(h.stdio("c1", "", agentv1.StreamHeader_KIND_STDOUT)), collect(h.stdio("c1", "", agentv1.StreamHeader_KIND_STDERR))
	in := h.stdio("c1", "", agentv1.StreamHeader_KIND_STDIN)
	req := request("c1", "sh", "-c", "mkdir /dev/l /dev/m; mount -t overlay o -o lowerdir=/bin:/dev/l /dev/m && echo overlaid; echo self $$; hostname; cat /etc/resolv.conf; ip -4 addr show eth0; ip route; ps; cat; date +%Y; echo oops >&2; exit 7")
	r, err := h.CreateContainer(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	step("created, pid %d", r.Pid)
	if _, err := h.StartContainer(ctx, &agentv1.StartContainerRequest{ContainerId: "c1"}); err != nil {
		t.Fatal(err)
	}
	step("started")
	if _, err := io.WriteString(in, "through stdin\n"); err != nil {
		t.Fatal(err)
	}
	_ = in.Close()
	w, err := h.WaitProcess(ctx, &agentv1.WaitProcessRequest{ContainerId: "c1"})
	if err != nil {
		t.Fatal(err)
	}
	printed := <-out
	step("ended: %v\n%s%s", w, printed, <-errs)
	// The overlay's module was loaded for the kernel by the agent's own program.
	for _, want := range []string{"overlaid\nself 1\nin-c1\nnameserver 10.0.2.3\n", "inet 10.0.2.15/24", "default via 10.0.2.2", "through stdin"} {
		if !strings.Contains(printed, want) {
			t.Errorf("%q is missing", want)
		}
	}
	if w.ExitCode != 7 {
		t.Errorf("exit code %d", w.ExitCode)
	}
	if _, err := h.DeleteContainer(ctx, &agentv1.DeleteContainerRequest{ContainerId: "c1"}); err != nil {
		t.Fatal(err)
	}
	step("deleted")

	// A container with a terminal, an exec beside it, and much output.
	req = request("c2", "sleep", "1000")
	req.Stdio = nil
	if _, err := h.CreateContainer(ctx, req); err != nil {
		t.Fatal(err)
	}
	if _, err := h.StartContainer(ctx, &agentv1.StartContainerRequest{ContainerId: "c2"}); err != nil {
		t.Fatal(err)
	}
	step("second container started")
	ex := &agentv1.ExecRequest{ContainerId: "c2", ExecId: "e1", Stdio: &agentv1.Stdio{Stdout: true}, Process: req.Process}
	ex.Process.Args = []string{"sh", "-c", "dd if=/dev/zero bs=50000 count=400"}
	big := h.stdio("c2", "e1", agentv1.StreamHeader_KIND_STDOUT)
	if _, err := h.Exec(ctx, ex); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	n, _ := io.Copy(io.Discard, big)
	_ = big.Close()
	if w, err = h.WaitProcess(ctx, &agentv1.WaitProcessRequest{ContainerId: "c2", ExecId: "e1"}); err != nil || n != 20000000 {
		t.Fatalf("%d bytes, %v, %v", n, w, err)
	}
	step("20 MB of output in %v", time.Since(begin))

	ex = &agentv1.ExecRequest{ContainerId: "c2", ExecId: "e2", Stdio: &agentv1.Stdio{Stdin: true, Stdout: true}, Process: req.Process}
	ex.Process.Args, ex.Process.Terminal = []string{"sh", "-c", "stty size; read x; stty size; echo got $x"}, true
	ex.Process.ConsoleHeight, ex.Process.ConsoleWidth = 30, 90
	in = h.stdio("c2", "e2", agentv1.StreamHeader_KIND_STDIN)
	out = collect(h.stdio("c2", "e2", agentv1.StreamHeader_KIND_STDOUT))
	if _, err := h.Exec(ctx, ex); err != nil {
		t.Fatal(err)
	}
	if _, err := h.ResizeTerminal(ctx, &agentv1.ResizeTerminalRequest{ContainerId: "c2", ExecId: "e2", Height: 11, Width: 22}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(in, "typed\n"); err != nil {
		t.Fatal(err)
	}
	if w, err = h.WaitProcess(ctx, &agentv1.WaitProcessRequest{ContainerId: "c2", ExecId: "e2"}); err != nil {
		t.Fatal(err)
	}
	if got := <-out; !strings.Contains(got, "11 22") || !strings.Contains(got, "got typed") {
		t.Errorf("terminal: %q", got)
	}
	step("terminal: %v", w)
	ps, err := h.ListProcesses(ctx, &agentv1.ListProcessesRequest{ContainerId: "c2"})
	if err != nil {
		t.Fatal(err)
	}
	step("processes: %v", ps.Processes)
	for _, sig := range []uint32{15, 9} {
		if _, err := h.SignalProcess(ctx, &agentv1.SignalProcessRequest{ContainerId: "c2", Signal: sig}); err != nil {
			t.Fatal(err)
		}
	}
	if w, err = h.WaitProcess(ctx, &agentv1.WaitProcessRequest{ContainerId: "c2"}); err != nil || w.Signal != 9 {
		t.Fatalf("%v, %v", w, err)
	}
	if _, err := h.DeleteContainer(ctx, &agentv1.DeleteContainerRequest{ContainerId: "c2"}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Shutdown(ctx, &agentv1.ShutdownRequest{}); err != nil {
		t.Fatal(err)
	}
	step("shut down")
}
