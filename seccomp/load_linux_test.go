package seccomp

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// childEnv makes the test binary the process that loads a filter.
const childEnv = "RUNV_SECCOMP_TEST_CHILD"

func TestMain(m *testing.M) {
	if section := os.Getenv(childEnv); section != "" {
		if err := loadChild(section); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// loadChild loads the filter and prints what some calls then return.
func loadChild(section string) error {
	var s specs.LinuxSeccomp
	if err := json.Unmarshal([]byte(section), &s); err != nil {
		return err
	}
	filter, flags, err := Compile(&s, runtime.GOARCH)
	if err != nil {
		return err
	}
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	prog := unix.SockFprog{Len: uint16(len(filter) / 8), Filter: (*unix.SockFilter)(unsafe.Pointer(&filter[0]))}
	const tsync = 1
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, 1, uintptr(flags|tsync), uintptr(unsafe.Pointer(&prog))); errno != 0 {
		return fmt.Errorf("load a filter of %d instructions: %w", prog.Len, errno)
	}
	show := func(name string, trap uintptr, args ...uintptr) {
		args = append(args, 0, 0, 0)
		_, _, errno := unix.Syscall(trap, args[0], args[1], args[2])
		fmt.Printf("%s %d\n", name, int(errno))
	}
	show("sethostname", unix.SYS_SETHOSTNAME, 0, ^uintptr(0))
	show("swapoff", unix.SYS_SWAPOFF, 0)
	show("personality-query", unix.SYS_PERSONALITY, 0xffffffff)
	show("personality-other", unix.SYS_PERSONALITY, 0x1234)
	show("socket-alg", unix.SYS_SOCKET, 38, unix.SOCK_SEQPACKET, 0)
	show("beyond", 5000)
	return nil
}

func load(t *testing.T, s *specs.LinuxSeccomp) (string, error) {
	t.Helper()
	section, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), childEnv+"="+string(section))
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func TestLoad(t *testing.T) {
	out, err := load(t, readProfile(t, "engine-default.json"))
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	// EPERM is the section's default, ENOSYS what is newer than the section.
	want := "sethostname 1\nswapoff 1\npersonality-query 0\npersonality-other 1\nsocket-alg 1\nbeyond 38\n"
	if out != want {
		t.Errorf("got\n%swant\n%s", out, want)
	}
}

func TestLoadErrno(t *testing.T) {
	e := uint(72)
	out, err := load(t, &specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow,
		Flags:         []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagLog},
		Syscalls: []specs.LinuxSyscall{
			{Names: []string{"swapoff", "no_such_call"}, Action: specs.ActErrno, ErrnoRet: &e},
			{Names: []string{"socket"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Index: 0, Value: 38, Op: specs.OpEqualTo}, {Index: 1, Value: 0xf, ValueTwo: 5, Op: specs.OpMaskedEqual}}},
		},
	})
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"swapoff 72\n", "socket-alg 1\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
}

func TestLoadKill(t *testing.T) {
	out, err := load(t, &specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow,
		Syscalls:      []specs.LinuxSyscall{{Names: []string{"swapoff"}, Action: specs.ActKillProcess}},
	})
	var exit *exec.ExitError
	if !errors.As(err, &exit) || !exit.Sys().(interface{ Signaled() bool }).Signaled() || !strings.Contains(exit.Error(), "bad system call") {
		t.Errorf("the process went on: %v\n%s", err, out)
	}
}
