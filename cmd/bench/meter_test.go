package main

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestMeter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		readings := []usage{{cpu: 1 * time.Second, rss: 100, peakRSS: 150}, {cpu: 3 * time.Second, rss: 300, peakRSS: 350}}
		m := newMeter(func() (usage, error) {
			next := readings[0]
			readings = readings[1:]
			return next, nil
		})
		_, err := m.sample(1)
		checkError(t, err, "not begun")
		m.begin()
		_, err = m.sample(1)
		checkError(t, err, "not ended")
		time.Sleep(4 * time.Second)
		m.end()
		_, err = m.sample(0)
		checkError(t, err, "nothing to measure")
		got, err := m.sample(1000)
		checkError(t, err, "")
		if want := (sample{cpu: 2 * time.Millisecond, rate: 250, rss: 200, peakRSS: 350}); got != want {
			t.Errorf("got %+v, want %+v", got, want)
		}
	})
}

func TestMeterOfAProcessThatIsGone(t *testing.T) {
	m := newMeter(func() (usage, error) { return usage{}, errors.New("gone") })
	m.begin()
	m.end()
	_, err := m.sample(1)
	checkError(t, err, "gone")
}
