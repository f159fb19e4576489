package cluster

import (
	"errors"
	"fmt"
	"net"
	"os/exec"
	"strconv"
	"strings"
)

// Heal ends a fault of the network. It may be called more than once.
type Heal func() error

// BlackHole drops every packet to and from the apiserver's address, also those between it
// and itself.
func (a *Apiserver) BlackHole() (Heal, error) {
	host, _, _ := net.SplitHostPort(a.Address)
	return drop([]string{"--source", host}, []string{"--destination", host})
}

// Mute drops every packet that the apiserver sends from its port: what is sent to it
// arrives.
func (a *Apiserver) Mute() (Heal, error) {
	host, port, _ := net.SplitHostPort(a.Address)
	return drop([]string{"--source", host, "--protocol", "tcp", "--sport", port})
}

// Refuse answers every packet to the apiserver's port by RST.
func (a *Apiserver) Refuse() (Heal, error) {
	host, port, _ := net.SplitHostPort(a.Address)
	return filter([]string{"--destination", host, "--protocol", "tcp", "--dport", port, "--jump", "REJECT", "--reject-with", "tcp-reset"})
}

// Lose drops a part of the packets to and from the apiserver's address, 0 to 1.
func (a *Apiserver) Lose(part float64) (Heal, error) {
	host, _, _ := net.SplitHostPort(a.Address)
	random := []string{"--match", "statistic", "--mode", "random", "--probability", strconv.FormatFloat(part, 'f', 4, 64)}
	return drop(append([]string{"--source", host}, random...), append([]string{"--destination", host}, random...))
}

// CutFromEtcd drops every packet between the apiserver and etcd: its /readyz fails after a
// while, and so do requests that need etcd.
func (a *Apiserver) CutFromEtcd() (Heal, error) {
	_, port, _ := net.SplitHostPort(a.etcd())
	return drop([]string{"--protocol", "tcp", "--sport", port}, []string{"--protocol", "tcp", "--dport", port})
}

// Reset cuts every connection to the apiserver by RST, in both directions, whatever it
// carries at the moment.
func (a *Apiserver) Reset() error {
	return inNamespace("ss", "--kill", "--tcp", "state", "established", "src", a.Address)
}

// drop drops the packets that match one of the rules.
func drop(rules ...[]string) (Heal, error) {
	for i := range rules {
		rules[i] = append(rules[i], "--jump", "DROP")
	}
	return filter(rules...)
}

// filter applies rules to packets where they arrive: the kernel tells the sender of one
// that is dropped on its way out.
func filter(rules ...[]string) (Heal, error) {
	var done [][]string
	heal := func() (err error) {
		for _, rule := range done {
			err = errors.Join(err, inNamespace("iptables", append([]string{"--wait", "--delete", "INPUT"}, rule...)...))
		}
		done = nil
		return err
	}
	for _, rule := range rules {
		if err := inNamespace("iptables", append([]string{"--wait", "--insert", "INPUT"}, rule...)...); err != nil {
			return nil, errors.Join(err, heal())
		}
		done = append(done, rule)
	}
	return heal, nil
}

// inNamespace runs a command that changes the network, in a namespace of our own only.
func inNamespace(name string, args ...string) error {
	if !InNamespace() {
		return fmt.Errorf("%s: only in a network namespace of one's own (EnterNamespace)", name)
	}
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return nil
}
